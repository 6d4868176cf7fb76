"""`dynadepth isoflop`: tables on stdout, files in the folder, bad input as one sentence."""

import yaml

from pretraining_runs import SHAPE, STEP, write_text

STUDY = {
    "kind": "isoflop",
    "name": "tiny",
    "source": "test",
    "base": {"model": {**SHAPE, "num_hidden_layers": 2}, "tokenizer": "bytes", "sequence_length": 16, "batch_size": 4},
    "sizes": {"small": {}},
    "variants": {"dense": {}, "mod": {"method": {"method": "mod", "capacity": 0.25}}},
    "budgets": [4.0 * STEP],
    "time_repeats": 1,
}


def test_a_study_prints_its_table_and_draws_its_figures(run, refused, tmp_path):
    recipe, out, text = tmp_path / "r.yaml", tmp_path / "out", write_text(tmp_path)
    recipe.write_text(yaml.safe_dump(STUDY))
    result = run("isoflop", "--recipe", recipe, "--out", out, "--data", text)
    assert result.exit_code == 0, result.output
    assert "the best mod (small) has a loss of" in result.stdout
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if name.startswith("loss-")] == [
        f"loss-{x}-2.28311e7.{suffix}" for x in ("forward", "parameters") for suffix in ("png", "svg")
    ]
    assert {"cells", "corpus", "isoflop.json", "table.md"} <= set(names)
    assert run("isoflop", "--recipe", recipe, "--out", out).exit_code == 0  # finished, and the corpus is there
    recipe.write_text(yaml.safe_dump({**STUDY, "variants": {"dense": {"learning_rate": 1.0}}}))
    assert "was made with other settings (recipe: learning_rate is 0.003 there and 1.0 here)" in refused(
        "isoflop", "--recipe", recipe, "--out", out
    )


def test_bad_input_is_one_sentence(refused, tmp_path):
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(STUDY))
    assert "holds no corpus: give the text with --data FILE" in refused("isoflop", "--recipe", recipe, "--out", out)
    assert "is a recipe for `dynadepth pretrain`" in refused("isoflop", "--recipe", "mod-small", "--out", out)
    recipe.write_text(yaml.safe_dump({**STUDY, "budgets": [10.0]}))
    message = refused("isoflop", "--recipe", recipe, "--out", out, "--data", write_text(tmp_path))
    assert message.startswith("1e1-small-dense-s0 cannot be trained: A budget of 10 FLOPs is below one step of ")
