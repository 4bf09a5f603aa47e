"""A value of another type, or none of the choices, is answered before Hydra composes."""

import pytest
from hydra.errors import ConfigCompositionException

from camera.runtime.errors import CameraError
from experiments.config.values import check_typed
from tests.helpers.runs.composing import command, config_of


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sparsity=abc", "sparsity=abc: give a number."),
        ("sparsity=", "sparsity=: give a number."),
        ("seed=1.5", "seed=1.5: give a whole number."),
        ("evaluation.blocks=many", "evaluation.blocks=many: give a whole number."),
        ("evaluation.speed.repeats=x", "evaluation.speed.repeats=x: give a whole number."),
        ("force=maybe", "force=maybe: give true or false."),
        ("sparsity_of=exprts", "sparsity_of=exprts is none of moe, model, routed"),
        ("method.rank_scope=globl", "none of layer, .*measured.*; did you mean global"),
        ("method=mc method.bits=few", "method.bits=few: give a number."),
        ("-m sparsity=0.2,high", "sparsity=high: give a number."),
        ("sparsity=0.2,0.4", "sparsity=0.2,0.4 are several values: `camera sweep`, or -m"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_one_sentence(argument, told):
    with pytest.raises(CameraError, match=told):
        check_typed(argument.split())


@pytest.mark.parametrize("value", ["sparsity=abc", "seed=1.5", "method.rank_scope=globl"])
def test_hydra_refuses_them_too(value):
    with pytest.raises(ConfigCompositionException):
        config_of(value)


def test_what_a_setting_can_have_goes_on_to_hydra():
    check_typed(["-m", "sparsity=0.2,0.4", "seed=range(3)", "alpha=1", "force=yes", "bits=2"])
    check_typed(["sparsity=${alpha}", "objective=null", "evaluation.tasks=[a,b]", "output='1,2'"])
    check_typed(["experiment=pruning", "seed=1,2", "method.bits=null", "model=tiny_moe"])
    check_typed(["method._target_=own.Method", "qqq=1", "hydra.job.name=x", "--help"])


def test_the_command_says_it(capsys):
    assert command("sparsity=abc") == "sparsity=abc: give a number."
