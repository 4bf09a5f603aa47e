"""A name that doesn't exist is answered with the nearest ones before Hydra composes."""

import pytest

from camera.runtime.errors import CameraError
from experiments.config.spelling import check_spelling
from tests.helpers.runs.composing import choices, command


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sparsty=0.3", "sparsty is no setting; did you mean sparsity or"),
        ("evaluation.blcks=2", "did you mean evaluation.blocks"),
        ("method.alpa=0.3", "did you mean method.alpha"),
        ("method=camerap", "method=camerap is no choice; did you mean camera_p"),
        ("experiment=mian", "did you mean main"),
        ("calibration=c4,wikitxt2", "calibration=wikitxt2 is no choice; did you mean wikitext2"),
        (
            "method=dense method.alpha=0.3",
            "method=dense has no settings of its own",
        ),
        ("method=camera_p,heapr method.alhpa=0", "did you mean method.alpha"),
        ("method=camera_p method.search=auto", "method.search is no setting; "),
        ("method=camera_plus target=layer", "target is no setting; did you mean method.target"),
        ("samples=64", "samples is no setting; did you mean calibration.samples?"),
        ("qqq=1", "qqq is no setting; there are alpha, "),
        ("sparsity", "sparsity has no value: write sparsity=VALUE, without spaces"),
        ("method = camera_p", "method has no value: write method=VALUE"),
        ("-m status", "'status' is no setting: write SETTING=VALUE"),
        ("experiment=main,alpha", r"write experiment=\[main,alpha\]"),
        ("calibration=texts/own.txt", "set by calibration.source=texts/own.txt"),
    ],
)
def test_a_typo_is_told_with_the_nearest_names(argument, told):
    with pytest.raises(CameraError, match=told):
        check_spelling(argument.split())


@pytest.mark.parametrize("group", ["method", "model", "evaluation", "experiment", "tracker"])
def test_every_choice_is_one(group):
    check_spelling([f"{group}={name}" for name in choices(group)])


def test_what_is_hydra_s_or_elsewhere_is_left_to_hydra():
    check_spelling(["hydra.job.name=x", "hydra/launcher=slurm", "+more=1", "~tracker", "-m"])
    check_spelling(["method.method=renamed", "evaluation.unpack=true", "experiment=null"][1:])
    check_spelling(["method=camera_p", "method._target_=my_camera.equal_widths.EqualWidths"])
    check_spelling(["--cfg", "job", "-m", "sparsity=0.2", "-sc", "install=bash"])
    check_spelling(["method=own", "--config-dir=conf"])
    check_spelling(["method=own", "hydra.searchpath=[file://conf]"])


def test_the_command_says_one_sentence(capsys):
    assert "did you mean sparsity" in command("sparsty=0.3")
