"""Recipes are strict: every setting is checked for name and type, and the shipped ones load."""

from dataclasses import replace

import pytest

from dynadepth.errors import ConfigError
from dynadepth.methods import MindSkipConfig, StaticConfig
from dynadepth.tuning.recipe import Recipe, known_recipes, load_recipe, recipe_from_dict
from dynadepth.tuning.route_recipe import load_route_recipe

GOOD = {"name": "x", "source": "test", "method": {"method": "mindskip"}}


@pytest.mark.parametrize("name", known_recipes())
def test_shipped_recipes_load_and_name_their_source(name):
    recipe = (load_route_recipe if name.startswith("drllm") else load_recipe)(name)
    assert recipe.name == name
    assert recipe.source
    recipe.config()


def test_the_papers_recipe_says_what_the_paper_says():
    recipe = load_recipe("mindskip-paper")
    config = recipe.config()
    assert config == MindSkipConfig(target="attention", granularity="sequence", bias=False, capacity=0.5, penalty=0.01)
    assert config.default_layers(32) == tuple(range(15, 31))  # the 16 deepest but the last
    assert (recipe.learning_rate, recipe.lr_scheduler, recipe.warmup, recipe.weight_decay) == (
        1e-5,
        "cosine",
        0.03,
        0.0,
    )
    assert recipe.batch_size * recipe.gradient_accumulation == 64
    assert (recipe.epochs, recipe.max_length, recipe.max_samples, recipe.shuffle) == (1, 2048, 1000, False)
    assert (recipe.objective, recipe.init, recipe.calibrate) == ("ce", "zeros", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 0.1}, "unknown setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"epochs": "many"}, "epochs must be float, not 'many'"),
        ({"batch_size": True}, "batch_size must be int, not True"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"objective": "mse"}, "objective must be one of ce, kl, not 'mse'"),
        ({"holdout": 1.0}, "holdout must be between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number of at least 0, not nan"),
        ({"path_learning_rate": -1.0}, "path_learning_rate must be a number of at least 0, not -1.0"),
        ({"bias_learning_rate": float("inf")}, "bias_learning_rate must be a number of at least 0, not inf"),
        ({"lora_learning_rate": -0.5}, "lora_learning_rate must be a number of at least 0, not -0.5"),
        ({"warmup": -1.0}, "warmup must be a number of at least 0, not -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0, not -1.0"),
        ({"epochs": float("nan")}, "epochs must be a number above 0, not nan"),
        ({"method": {"method": "mindskip", 3: 4}}, "3"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict({**GOOD, **change}, "here.yaml").config()


def test_another_method_keeps_the_settings_that_it_has_too():
    recipe = replace(load_recipe("default"), choose=True)
    static = recipe.for_method("static")
    kept = {"granularity": "route", "layers": "all", "skip_path": "linear", "skip_rank": 64}
    assert static.method == {"method": "static", **kept}
    assert static.config() == StaticConfig(**kept)
    assert not static.choose  # the method is named
    assert replace(static, name="x", method=recipe.method) == replace(recipe, name="x", choose=False)
    assert recipe.for_method("mindskip").method == recipe.method
    with pytest.raises(ConfigError, match=r"'statik'.*Did you mean 'static'"):
        recipe.for_method("statik")


def test_missing_settings_and_unknown_recipes(tmp_path):
    with pytest.raises(ConfigError, match="lacks source, method"):
        recipe_from_dict({"name": "x"}, "here.yaml")
    with pytest.raises(ConfigError, match=r"no recipe 'defualt'.*Did you mean 'default'"):
        load_recipe("defualt")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_recipe(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="holds no settings"):
        load_recipe(broken)


def test_method_settings_are_checked_when_the_method_is_built():
    with pytest.raises(ConfigError, match=r"no setting 'capacitty'\. Did you mean 'capacity'"):
        Recipe(**{**GOOD, "method": {"method": "mindskip", "capacitty": 1}}).config()
    with pytest.raises(ConfigError, match=r"'mindskp'.*Did you mean 'mindskip'"):
        Recipe(**{**GOOD, "method": {"method": "mindskp"}}).config()


def test_a_method_that_trains_the_base_is_not_tuned() -> None:
    with pytest.raises(ConfigError, match="'mod' is trained together with the whole model"):
        load_recipe("mindskip-paper").for_method("mod").config()


def test_the_default_measures_which_order_a_model_wants():
    assert load_recipe("default").order == "auto"
