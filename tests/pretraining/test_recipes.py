"""The shipped recipes load under their own name, each for its command, and say what the paper says."""

import pytest

from dynadepth.errors import ConfigError
from dynadepth.isoflop.recipe import load_recipe as load_isoflop
from dynadepth.pretraining.recipe import PretrainRecipe, load_recipe
from dynadepth.recipe_files import COMMANDS, checked, known_recipes, read_recipe, recipe_folder
from pretraining_runs import DENSE

PAPER = {"capacity": 0.125, "every": 2, "routing": "top_k", "weighting": "linear", "unit_input": False}


@pytest.mark.parametrize("name", known_recipes("pretraining"))
def test_pretraining_recipes_load(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.source


@pytest.mark.parametrize("name", known_recipes("isoflop"))
def test_isoflop_recipes_load(name):
    recipe = load_isoflop(name)
    assert recipe.name == name
    assert recipe.source
    assert next(iter(recipe.variants)) == "dense"


@pytest.mark.parametrize("kind", ["pretraining", "isoflop"])
def test_a_recipe_without_its_kind_is_told_how_to_name_it(tmp_path, kind):
    (tmp_path / "r.yaml").write_text("name: x\nsource: y\n")
    with pytest.raises(ConfigError, match=f"not for `dynadepth .*add `kind: {kind}`"):
        read_recipe(tmp_path / "r.yaml", kind)
    (tmp_path / "r.yaml").write_text("kind: tuning\nname: x\nsource: y\n")
    with pytest.raises(ConfigError, match=r"not for `dynadepth \w+`\.$"):
        read_recipe(tmp_path / "r.yaml", kind)


def test_every_shipped_recipe_has_a_command():
    files = sorted(path.stem for path in recipe_folder().glob("*.yaml"))
    assert files == sorted(name for kind in COMMANDS for name in known_recipes(kind))


def test_the_papers_recipe_says_what_the_paper_says():
    recipe = load_recipe("mod-paper")
    config = recipe.depth_config()
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert (recipe.batch_size, recipe.sequence_length, recipe.flops) == (128, 2048, 6e18)


def test_the_small_recipes_differ_in_their_method_alone():
    routed, dense = load_recipe("mod-small").to_dict(), load_recipe("mod-small-dense").to_dict()
    assert {key for key in routed if routed[key] != dense[key]} == {"name", "source", "method"}


def test_numbers_with_exponents_are_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("kind: pretraining\nname: x\nsource: y\nflops: 1e13\nmodel: {}\nstart: z\n")
    data, _ = read_recipe(tmp_path / "r.yaml", "pretraining")
    assert data["flops"] == 1e13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer must be bytes or bpe, not 'words'"),
        (
            {"vocab_size": 100, "tokenizer": "bpe"},
            "vocab_size must be at least 258 .*, not 100; or set tokenizer to bytes",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": 6, "gradient_accumulation": 4}, "batch_size 6 is no multiple of gradient_accumulation 4"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, not -1"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295"),
        ({"flops": 0.0}, r"flops must be a number above 0, not 0\.0"),
        ({"holdout": 1.0}, r"holdout must be at least 0 and below 1, not 1\.0"),
        ({"start": "x"}, "start 'x' gives the model's shape: leave model out"),
        ({"model": {}}, "'tiny' has neither a model to make nor one to start from"),
        ({"batch_size": "8"}, "batch_size must be int, not '8'"),
        ({"learning_rat": 1}, "unknown setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"method": {"method": "mod", "capasity": 1}}, "Method 'mod' has no setting 'capasity'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        PretrainRecipe(**checked(PretrainRecipe, {**DENSE.to_dict(), **change}, "here"))
