"""A chat template that the user gives as a file."""

from pathlib import Path


def read_template(path: Path, what: str) -> str:
    """The Jinja text in `path`, whose syntax has been checked. `what`: its name in errors, like "--chat-template".

    Raises ValueError for a file that cannot be read, is empty, or is no template. What a template refuses about a
    conversation shows only when it renders one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{what} {path} cannot be read ({reason}); give a file with a Jinja template.") from None
    if not text.strip():
        raise ValueError(f"{what} {path} is empty; give a file with a Jinja template.")
    _check_syntax(text, f"{what} {path}")
    return text


def _check_syntax(text: str, what: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "hello"}]], chat_template=text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{what} is no Jinja template (line {error.lineno}: {error.message}); mend it.") from None
    except Exception:  # it needs names that only a tokenizer has, or refuses this conversation
        return
