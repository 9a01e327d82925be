"""Bytes of weights, activations and KV pages of each rank. Pure functions of plan and model.

T tokens of a step, H hidden size, G head groups of a primary, M query heads per group, D head_dim, F MLP columns of a
primary, V vocabulary rows of a primary, R rows whose logits are computed at once, S tokens per page.
"""

from hetis.core.model_spec import DTYPE_BYTES, ModelSpec
from hetis.core.plan import Member, Plan, Primary
from hetis.core.token_logprobs import SCORED_ROWS
from hetis.cost.limits import Limits

FLOAT32_BYTES = DTYPE_BYTES["float32"]
LOGIT_COPIES = 3  # float32 copies of the logits that sampling makes: scaled, sorted, cumulated
WEIGHT_COPIES = 2  # of the int64 sampling weights: themselves and cumulated
PACKED_ROWS = 32  # to which rows of matrices are padded on CPUs (inputs: to 2 in bfloat16); as in kernels/linear.py
WEIGHTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # values; as in ranks/sampling/draw.py


def weight_bytes(spec: ModelSpec, plan: Plan, primary: Primary, dtype: str) -> int:
    """Weights of one primary: exactly the tensors that `models.loader.load_weights` keeps, with their padding."""
    stage_index, tp_index = plan.position_of(primary.rank)
    padding = sum(_padding(matrix, primary, dtype) for matrix in _layer_matrices(spec, primary))
    values = plan.stages[stage_index].num_layers * (layer_weights(spec, plan, primary) + padding)
    table = primary.num_vocab_rows * spec.hidden_size
    is_first, is_last = plan.is_first(stage_index), plan.is_last(stage_index)
    if is_first:
        values += table
        if spec.learned_position_offset is not None and tp_index == 0:
            values += (spec.max_position + spec.learned_position_offset) * spec.hidden_size
    if is_last:
        values += spec.hidden_size * _norm_vectors(spec)
        values += 0 if spec.tied_embeddings and is_first else table
        values += _padding((primary.num_vocab_rows, spec.hidden_size), primary, dtype)
    return values * DTYPE_BYTES[dtype]


def layer_weights(spec: ModelSpec, plan: Plan, primary: Primary) -> int:
    """Values in one layer of one primary. One token takes two operations with each of them."""
    hidden, head_dim = spec.hidden_size, spec.head_dim
    (qkv_rows, _), _, (mlp_rows, _), _ = shapes = _layer_matrices(spec, primary)
    matrices = sum(rows * columns for rows, columns in shapes)
    vectors = 2 * hidden * _norm_vectors(spec) + (2 * head_dim if spec.qk_norm else 0)
    vectors += qkv_rows if spec.qkv_bias else 0
    vectors += mlp_rows if spec.mlp_bias else 0
    if plan.position_of(primary.rank)[1] == 0:
        vectors += hidden * (spec.output_bias + spec.mlp_bias)
    return matrices + vectors


def _layer_matrices(spec: ModelSpec, primary: Primary) -> tuple[tuple[int, int], ...]:
    """Rows and columns of QKV, output projection, gate and up, and down."""
    hidden, columns = spec.hidden_size, primary.num_mlp_columns
    return (
        (primary.num_groups * spec.heads_per_group * spec.head_dim, hidden),
        (hidden, primary.num_groups * spec.queries_per_group * spec.head_dim),
        (columns * spec.gate_factor, hidden),
        (hidden, columns),
    )


def _padding(matrix: tuple[int, int], primary: Primary, dtype: str) -> int:
    """Values that packing adds to a matrix."""
    if primary.device != "cpu":
        return 0
    (rows, columns), step = matrix, 2 if dtype == "bfloat16" else 1
    return -(-rows // PACKED_ROWS) * PACKED_ROWS * -(-columns // step) * step - rows * columns


def activation_bytes(spec: ModelSpec, plan: Plan, primary: Primary, limits: Limits) -> int:
    """What one primary computes in: what is allocated once, and the most that a step allocates besides.

    A step allocates the hidden states that come from the stage before, a copy of them where norms or positions need
    one, and in the last stage logits and what sampling makes of them.
    """
    stage_index, tp_index = plan.position_of(primary.rank)
    num_hidden = (not plan.is_first(stage_index)) + (spec.norm == "layer" or spec.learned_position_offset is not None)
    total = workspace_bytes(spec, primary, limits)
    total += num_hidden * hidden_bytes(spec, limits)
    if plan.is_last(stage_index):
        total += logit_rows(limits) * (primary.num_vocab_rows + 2 * spec.hidden_size) * limits.value_bytes
        total += sampling_bytes(spec, primary, limits) if tp_index == 0 else 0
    return total


def workspace_bytes(spec: ModelSpec, primary: Primary, limits: Limits) -> int:
    """What one primary allocates once: the decoder's buffers and rope table.

    Values per token: 3 H + G (M + 2) D + G M D + F, and another F (or 2 F) before the activation.
    """
    heads = primary.num_groups * (spec.heads_per_group + spec.queries_per_group)
    columns = primary.num_mlp_columns * (3 if spec.gated else 1)
    per_token = (3 * spec.hidden_size + heads * spec.head_dim + columns) * limits.value_bytes
    rope = limits.max_model_len * spec.rope.rotary_dim * FLOAT32_BYTES if spec.rope is not None else 0
    return limits.max_num_batched_tokens * per_token + rope


def sampling_bytes(spec: ModelSpec, primary: Primary, limits: Limits) -> int:
    """Copies of the logits while tokens are drawn, and the tables of tokens and counts from which penalties follow."""
    logits = logit_rows(limits) * spec.vocab_size
    at_once = WEIGHTS_AT_ONCE["cpu" if primary.device == "cpu" else "cuda"]
    weights = min(logits, max(spec.vocab_size, at_once)) * 8 * WEIGHT_COPIES
    penalties = limits.max_num_seqs * (4 * spec.vocab_size + 2 * 8 * limits.max_model_len)  # which grows by doubling
    return logits * FLOAT32_BYTES * LOGIT_COPIES + weights + penalties


def hidden_bytes(spec: ModelSpec, limits: Limits) -> int:
    """[T, H] hidden states of the largest step."""
    return limits.max_num_batched_tokens * spec.hidden_size * limits.value_bytes


def logit_rows(limits: Limits) -> int:
    """R: every sequence that draws a token, or a block of a prompt that is scored."""
    return max(limits.max_num_seqs, SCORED_ROWS)


def page_bytes(spec: ModelSpec, num_layers: int, block_size: int, dtype: str) -> int:
    """One page: K and V of `block_size` tokens of one lane, for so many layers."""
    return block_size * spec.kv_bytes_per_token(num_layers, dtype)


def page_bytes_of(spec: ModelSpec, plan: Plan, member: Member, block_size: int, dtype: str) -> int:
    """One page in every pool of a rank: that of its stage for a primary, those of all stages for a worker."""
    if isinstance(member, Primary):
        return page_bytes(spec, plan.stage_of(member).num_layers, block_size, dtype)
    return sum(page_bytes(spec, stage.num_layers, block_size, dtype) for stage in plan.stages)


def _norm_vectors(spec: ModelSpec) -> int:
    return 2 if spec.norm == "layer" else 1
