"""Tables of options in the documentation are those of the parsers."""

import argparse
from pathlib import Path

import pytest

from hetis.cli.flags import flag_table, renewed
from hetis.cli.main import build_parser

PAGES = Path(__file__).parent.parent.parent / "docs"


def test_a_table_has_every_option_once_in_the_order_of_the_help() -> None:
    [commands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    parser = commands.choices["serve"]
    table = flag_table(parser)
    rows = [row.split(" | ") for row in table.splitlines()]
    names = [row[0].removeprefix("| ").strip("`").split()[0] for row in rows[2:] if not row[0].startswith("| **")]
    options = [action.option_strings[-1] for action in parser._actions if action.option_strings]
    assert sorted(names) == sorted({*options, "MODEL"} - {"--help"})
    assert names.index("--host") < names.index("--port") < names.index("--revision")
    assert "| `--port N` | `8000` | port to listen on; 0: any that is free |" in table
    assert "| `--uds PATH` |  | listen on a unix socket, not on a port |" in table
    assert "| `--ssl-cert-reqs {0,1,2}` | `0` |" in table
    assert "| **address** | | |" in table


def test_cells_cannot_break_the_table() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", help="a | b")
    assert "| `--x X` |  | a \\| b |" in flag_table(parser)


def test_a_page_is_renewed_between_its_marks() -> None:
    page = "before\n<!-- flags:bench latency -->\nobsolete\n<!-- /flags:bench latency -->\nafter <!-- flags:serve -->\n"
    new = renewed(page)
    assert new.startswith("before\n<!-- flags:bench latency -->\n\n| option | default | meaning |\n")
    assert new.endswith("\n<!-- /flags:bench latency -->\nafter <!-- flags:serve -->\n")
    assert "--num-iters" in new
    assert "obsolete" not in new
    assert renewed(new) == new


def test_a_page_cannot_name_an_unknown_command() -> None:
    with pytest.raises(ValueError, match="no command 'speed'"):
        renewed("<!-- flags:speed -->\n<!-- /flags:speed -->")


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: page.name)
def test_documentation_and_code_agree(page: Path) -> None:
    text = page.read_text()
    assert renewed(text) == text, f"run: python -m hetis.cli.flags {page}"
