"""What a drawn token means for its sequence: its next token, its end, or nothing."""

from hetis.core.batch import NewToken
from hetis.core.request import Sequence


def accept(sequence: Sequence, token: int, *, valid: bool) -> NewToken | None:
    """Appends a valid token and finishes the sequence if it ends here; None, and nothing changes, if it had ended."""
    if sequence.finish_reason is not None:
        return None
    if not valid:
        sequence.finish_reason = "error"
        return NewToken(sequence=sequence, token=None)
    sequence.token_ids.append(token)
    if token in sequence.stop_ids:
        sequence.finish_reason = "stop"
        sequence.stop_reason = token if token in sequence.params.stop_token_ids else None
    elif sequence.num_output >= sequence.max_tokens:
        sequence.finish_reason = "length"
    return NewToken(sequence=sequence, token=token)
