"""`dynadepth pretrain`: what is printed, what is left, and bad input as one sentence."""

import pytest

from pretraining_runs import DENSE, MOD, STEP, to_yaml, write_text


@pytest.fixture
def words(tmp_path):
    recipe, text = to_yaml(MOD, tmp_path / "r.yaml"), write_text(tmp_path)
    return ["pretrain", "--recipe", recipe, "--data", text, "--out", tmp_path / "out", "--flops", str(6 * STEP)]


def test_a_run_prints_its_losses_and_what_to_do_next(run, words, tmp_path):
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "decided as in generation" in result.stdout
    assert "decided as in training" in result.stdout
    model = tmp_path / "out" / "model"
    generated = run("generate", model, "--routers", model / "routers", "--prompt", "the cat", "--max-new-tokens", 3)
    assert generated.exit_code == 0, generated.output


def test_resume_needs_the_same_recipe(run, refused, words, tmp_path):
    assert run(*words).exit_code == 0
    assert "holds a run already: --resume goes on with it" in refused(*words)
    assert run(*words, "--resume").exit_code == 0
    to_yaml(MOD, tmp_path / "r.yaml", warmup=0.5)
    assert "(recipe: warmup is 0.05 there and 0.5 here)" in refused(*words, "--resume")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--flops": "many"}, "--flops must be a number of FLOPs above 0, such as 1e14, not 'many'."),
        ({"--flops": "-1"}, "--flops must be a number of FLOPs above 0, such as 1e14, not '-1'."),
        ({"--flops": "10"}, "A budget of 10 FLOPs is below one step of"),
        ({"--recipe": "default"}, "is a recipe for `dynadepth tune`, not for `dynadepth pretrain`."),
        ({"--recipe": "mod-smal"}, "There is no recipe 'mod-smal'"),
    ],
)
def test_bad_input_is_one_sentence(refused, words, change, message):
    for option, value in change.items():
        words[words.index(option) + 1] = value
    assert message in refused(*words)


def test_tune_refuses_a_pretraining_recipe(refused, model_folder, tmp_path):
    recipe = to_yaml(DENSE, tmp_path / "r.yaml")
    message = refused("tune", model_folder, "--recipe", recipe, "--out", tmp_path / "out")
    assert "is a recipe for `dynadepth pretrain`, not for `dynadepth tune`." in message
