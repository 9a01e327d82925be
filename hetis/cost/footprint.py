"""How many bytes each rank needs for weights, activations and one KV page. Pure functions of plan and model.

T tokens of a step, H hidden size, G head groups of a primary, M query heads per group, D head_dim, F MLP columns of a
primary, V vocabulary rows of a primary, S tokens per page.
"""

from hetis.core.model_spec import DTYPE_BYTES, ModelSpec
from hetis.core.plan import AttentionWorker, Plan, Primary
from hetis.core.token_logprobs import SCORED_ROWS

LOGIT_COPIES = 3  # float32 copies of the logits that sampling makes: scaled, sorted, cumulated
WEIGHT_COPIES = 2  # of the int64 weights that it draws by: themselves and cumulated
WEIGHTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # as in workers/draw.py


def weight_bytes(spec: ModelSpec, plan: Plan, stage_index: int, tp_index: int, dtype: str) -> int:
    """What one primary's weights take: exactly the tensors that `models.loader.load_weights` keeps."""
    stage = plan.stages[stage_index]
    primary = stage.primaries[tp_index]
    values = stage.num_layers * layer_weights(spec, primary, tp_index)
    table = primary.num_vocab_rows * spec.hidden_size
    is_first, is_last = plan.is_first(stage_index), plan.is_last(stage_index)
    if is_first:
        values += table
        if spec.learned_position_offset is not None and tp_index == 0:
            values += (spec.max_position + spec.learned_position_offset) * spec.hidden_size
    if is_last:
        values += spec.hidden_size * _norm_vectors(spec)
        values += 0 if spec.tied_embeddings and is_first else table
    return values * DTYPE_BYTES[dtype]


def layer_weights(spec: ModelSpec, primary: Primary, tp_index: int) -> int:
    """Values in one layer of one primary. One token takes two operations with each of them."""
    hidden, head_dim = spec.hidden_size, spec.head_dim
    qkv_rows = primary.num_groups * spec.rows_per_group * head_dim
    output_columns = primary.num_groups * spec.queries_per_group * head_dim
    mlp_rows = primary.num_mlp_columns * spec.gate_factor
    matrices = hidden * (qkv_rows + output_columns + mlp_rows + primary.num_mlp_columns)
    vectors = 2 * hidden * _norm_vectors(spec) + (2 * head_dim if spec.qk_norm else 0)
    vectors += qkv_rows if spec.qkv_bias else 0
    vectors += mlp_rows if spec.mlp_bias else 0
    if tp_index == 0:
        vectors += hidden * (spec.output_bias + spec.mlp_bias)
    return matrices + vectors


def activation_bytes(
    spec: ModelSpec,
    plan: Plan,
    stage_index: int,
    tp_index: int,
    dtype: str,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_position: int,
) -> int:
    """Of one primary: the decoder's workspace, its rope table, and logits where the stage is the last one.

    Workspace per token: 3 H + G (M + 2) D + G M D + F, and another F (or 2 F) before the activation.
    """
    primary = plan.stages[stage_index].primaries[tp_index]
    heads = primary.num_groups * (spec.rows_per_group + spec.queries_per_group)
    columns = primary.num_mlp_columns * (3 if spec.gated else 1)
    total = max_num_batched_tokens * (3 * spec.hidden_size + heads * spec.head_dim + columns) * DTYPE_BYTES[dtype]
    if spec.rope is not None:
        total += max_position * spec.rope.rotary_dim * DTYPE_BYTES["float32"]
    if plan.is_last(stage_index):
        rows = max(max_num_seqs, SCORED_ROWS)
        total += rows * primary.num_vocab_rows * DTYPE_BYTES[dtype]
        if tp_index == 0:  # samples
            total += rows * spec.vocab_size * DTYPE_BYTES["float32"] * LOGIT_COPIES
            at_once = WEIGHTS_AT_ONCE["cpu" if primary.device == "cpu" else "cuda"]
            total += min(rows * spec.vocab_size, max(spec.vocab_size, at_once)) * 8 * WEIGHT_COPIES
    return total


def page_bytes(spec: ModelSpec, num_layers: int, block_size: int, dtype: str) -> int:
    """One page: K and V of `block_size` tokens of one lane, for so many layers."""
    return block_size * spec.kv_bytes_per_token(num_layers, dtype)


def page_bytes_of(spec: ModelSpec, plan: Plan, member: Primary | AttentionWorker, block_size: int, dtype: str) -> int:
    """One page in every pool of a rank: its stage's for a primary, all stages' for a worker."""
    if isinstance(member, Primary):
        return page_bytes(spec, plan.stages[plan.position_of(member.rank)[0]].num_layers, block_size, dtype)
    return sum(page_bytes(spec, stage.num_layers, block_size, dtype) for stage in plan.stages)


def fixed_bytes(
    spec: ModelSpec,
    plan: Plan,
    member: Primary | AttentionWorker,
    dtype: str,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int | None = None,
) -> tuple[int, int]:
    """(weights, activations) of a rank. A worker has neither: it computes inside its messages."""
    if not isinstance(member, Primary):
        return 0, 0
    where = plan.position_of(member.rank)
    positions = min(max_model_len or spec.max_position, spec.max_position)
    return weight_bytes(spec, plan, *where, dtype), activation_bytes(
        spec, plan, *where, dtype, max_num_batched_tokens, max_num_seqs, positions
    )


def _norm_vectors(spec: ModelSpec) -> int:
    return 2 if spec.norm == "layer" else 1
