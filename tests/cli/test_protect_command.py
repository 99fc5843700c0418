"""``mlx-svd protect`` on the embedded model, which knows capitals."""

import json

import pytest

import mlx_svd
from mlx_svd.demo import DEMO_MODEL
from mlx_svd.evaluate.facts import facts_recalled, read_facts

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Austria": "Vienna",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Egypt": "Cairo",
    "Greece": "Athens", "Poland": "Warsaw", "Cuba": "Havana",
}  # fmt: skip
QUICK = ("--steps", "12", "--lr", "1e-3", "--measure-every", "6", "--prompts", "2", "--max-tokens",
         "8", "--text-windows", "8", "--text-length", "32")  # fmt: skip


def write_facts(path, subjects, **extra):
    cities = list(CAPITALS.values())
    rows = []
    for subject in subjects:
        i = cities.index(CAPITALS[subject])
        false = [cities[(i + k) % len(cities)] for k in (1, 2, 3)]
        rows.append(
            {
                "relation": "capital",
                "subject": subject,
                "object": CAPITALS[subject],
                "prompt": f"The capital of {subject} is",
                "conflict": false[0],
                "distractors": false[1:],
                **extra,
            }
        )
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def command(tmp_path):
    facts = write_facts(tmp_path / "facts.json", CAPITALS)
    conflict = write_facts(tmp_path / "conflict.json", ["France", "Norway", "Cuba"])
    return ("protect", "--model", DEMO_MODEL, "--facts", facts, "--conflict", conflict,
            "--mlx-path", tmp_path / "out", *QUICK)  # fmt: skip


def test_it_learns_the_conflict_and_says_what_was_kept(run, command, tmp_path):
    code, printed, progress = run(*command, "--arm", "none")
    assert code == 0
    result = json.loads((tmp_path / "out" / "mlx_svd_protect.json").read_text())
    assert result["knowledge"]["uptake"]["value"] == 1
    assert "step 12 of 12: uptake 1.000" in progress
    assert "note: uptake went from 0.000 to 1.000 of 3 conflict facts" in printed
    assert "paraphrase_uptake" in printed
    assert "not measured" in printed
    assert "warning (lr): learning rate 0.001" in printed
    model, tokenizer = mlx_svd.load(tmp_path / "out", dtype="float32")
    recalled = facts_recalled(model, tokenizer, read_facts(tmp_path / "conflict.json"))
    assert not recalled.recalled.any()
    lines = (tmp_path / "out" / "mlx_svd_protect_items.jsonl").read_text().splitlines()
    groups = [json.loads(line)["group"] for line in lines]
    assert groups.count("conflict") == 3
    assert len(groups) == 12 - result["facts"]["replay"]


def test_facts_are_asked_in_the_words_of_a_file_of_templates(run, command, tmp_path):
    templates = tmp_path / "templates.yaml"
    templates.write_text('capital: ["The seat of the government of {subject} is"]')
    code, printed, _ = run(*command, "--arm", "none", "--paraphrases", templates, "--json")
    assert code == 0
    result = json.loads(printed)
    uptake = result["knowledge"]["paraphrase_uptake"]
    assert (uptake["n"], uptake["rows"]) == (3, 3)
    assert uptake["value"] > result["base"]["knowledge"]["paraphrase_uptake"]["value"]
    assert result["base"]["knowledge"]["paraphrase_retained"]["value"] == 1


def test_templates_for_a_relation_without_facts_are_refused(run, command, tmp_path):
    templates = tmp_path / "templates.yaml"
    templates.write_text('captial: ["The seat of the government of {subject} is"]')
    code, _, error = run(*command, "--paraphrases", templates)
    assert code == 2
    assert "no fact has the relation 'captial'" in error


def test_json_is_one_document_and_options_change_an_arm(run, command):
    options = ("--arm", "cf90", "--freeze", "0.5", "--form", "dense", "--json", "--accept", "lr")
    code, printed, _ = run(*command, *options)
    assert code == 0
    result = json.loads(printed)
    assert result["arm"]["name"] == "cf90, changed"
    assert result["training"]["frozen_layers"] == 3
    assert result["training"]["compressed"] == 9
    accepted = {w["name"]: w["accepted"] for w in result["warnings"]}
    assert accepted == {"epochs": False, "lr": True, "freeze": False}


def test_the_seeds_preset_is_five_steps_of_unmasked_padding(run, command, tmp_path):
    code, printed, _ = run(*command[: -len(QUICK)], *QUICK[6:], "--preset", "seed", "--json")
    assert code == 0
    result = json.loads(printed)
    settings = result["settings"]
    assert (settings["mask_padding"], settings["pad_to"], settings["scoring"]) == (
        False,
        32,
        "seed",
    )
    assert result["steps"] == 1
    assert result["arm"]["form"] == "dense"
    assert any("nothing was learned for certain" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--arm", "cf91"), "--arm cf91: use one of"),
        (("--preset", "mine"), "--preset mine: use seed"),
        (("--conflict-count", "3"), "--conflict and --conflict-count: give one"),
        (("--freeze", "1"), "all 6 layers are frozen, which leaves nothing to train"),
        (("--freeze-from", "side"), "--freeze-from side: use bottom or top"),
        (("--hierarchical", "0.9"), "--hierarchical 0.9: give two shares"),
        (("--strict",), "--accept epochs"),
        (("--lr", "0"), "--lr 0.0: must be a number above 0"),
        (("--projections", "q,x"), "projection 'x'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(run, command, change, words):
    code, printed, err = run(*command, *change)
    assert (code, printed) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"conflict": None}, 'entry 0 has no text in "conflict"'),
        ({"conflict": "paris"}, "its conflict 'paris' is the true object"),
    ],
)
def test_a_bad_fact_is_named(run, command, tmp_path, extra, words):
    write_facts(tmp_path / "facts.json", ["France"], **extra)
    code, _, err = run(*command)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1
