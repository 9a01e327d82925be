"""Whether torchrun has started a process, and variables that it does not set."""

import pytest

from hetis.launch import torchrun

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},  # Kubeflow's PyTorchJob, SageMaker
        {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"},  # SLURM scripts
        {"RANK": "abc", "TORCHELASTIC_RUN_ID": ""},
    ],
)
def test_variables_of_clusters_do_not_make_a_rank(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_all(monkeypatch, variables)
    assert not torchrun.under_torchrun()


def test_all_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN)
    assert torchrun.under_torchrun()
    torchrun.check_variables()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "abc"}, ["RANK is 'abc'", "whole number"]),
        ({"RANK": "3"}, ["RANK is 3", "WORLD_SIZE is 3"]),
        ({"RANK": "-1"}, ["RANK is -1"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK is 2", "LOCAL_WORLD_SIZE is 2"]),
        ({"GROUP_WORLD_SIZE": "0"}, ["GROUP_RANK is 0", "GROUP_WORLD_SIZE is 0"]),
        ({"WORLD_SIZE": "1e3"}, ["WORLD_SIZE is '1e3'"]),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT is 0"]),
        ({"MASTER_PORT": ""}, ["but not MASTER_PORT:"]),
        ({"LOCAL_RANK": "", "MASTER_ADDR": ""}, ["but not LOCAL_RANK, MASTER_ADDR:"]),
    ],
)
def test_variables_that_cannot_be_torchruns_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: list[str]
) -> None:
    set_all(monkeypatch, TORCHRUN | changes)
    with pytest.raises(ValueError) as refusal:
        torchrun.check_variables()
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


def test_children_of_another_kind_see_nothing_of_torchrun() -> None:
    more = {"TORCHELASTIC_ERROR_FILE": "/x", "PATH": "/bin", "HOME": "/root"}
    assert torchrun.without_torchrun(TORCHRUN | more) == {"PATH": "/bin", "HOME": "/root"}
