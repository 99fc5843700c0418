"""Facts, flips, perplexities and rows of the hub, against plain computations."""

import json
import math
import shutil

import numpy as np
import pytest

from mlx_svd.demo import DEMO_MODEL
from mlx_svd.errors import MlxSvdError
from mlx_svd.evaluate.comparison.compare import compare
from mlx_svd.evaluate.rows.fact_rows import facts_file
from mlx_svd.evaluate.tasks import CHOICE_TASKS
from tests.evaluate.reference import losses
from tests.evaluate.tasks.material import FACTS, read, run


def test_facts_are_told_apart_and_written(data, tmp_path):
    results = run(["facts"], tmp_path / "out", data_dir=data)
    records = read(tmp_path / "out/samples_facts.jsonl")
    assert [r["acc"] for r in records] == [1, 1, 0, 1], "Quito is not the capital of Spain"
    assert [r["exact_match"] for r in records] == [1, 1, 0, 1]
    assert "Paris" in records[0]["text"]
    assert results["results"]["facts"]["acc,none"] == 0.75
    assert results["intervals"]["facts"]["acc"]["chance"] == 0.25


def test_only_facts_that_the_base_model_knows_count_for_retention(data, tmp_path, shared):
    other = shared / "models/gpt-neo-8m"
    results = run(["facts"], tmp_path / "out", other, data_dir=data, base=str(DEMO_MODEL))
    records = read(tmp_path / "out/samples_facts.jsonl")
    assert [r["retained"] for r in records] == [
        *(r["acc"] for r in records[:2]), None, records[3]["acc"]
    ]  # fmt: skip
    assert results["intervals"]["facts"]["retained"]["n"] == 3
    base = tmp_path / "out/base" / DEMO_MODEL.name
    again = run(["facts"], tmp_path / "again", other, data_dir=data, base=str(base))
    assert again["results"] == results["results"], "results of the base serve as well as its model"


def test_a_base_that_was_asked_other_facts_is_refused(data, tmp_path):
    run(["facts"], tmp_path / "base", data_dir=data, limit=2)
    with pytest.raises(MlxSvdError, match=r"samples_facts\.jsonl: lacks document 2"):
        run(["facts"], tmp_path / "out", data_dir=data, base=str(tmp_path / "base"))
    (data / "facts.json").write_text(json.dumps(FACTS[::-1]))
    with pytest.raises(MlxSvdError, match="other rows"):
        run(["facts"], tmp_path / "out", data_dir=data, limit=2, base=str(tmp_path / "base"))


def test_a_base_that_was_asked_in_another_way_is_refused(tmp_path):
    row = {"question": "The capital of France is", "choices": ["Rome", "Paris"], "label": 1}
    path = tmp_path / "own.jsonl"
    rows = [row, {**row, "question": "The capital of Italy is", "label": 0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run([path], tmp_path / "base", num_fewshot=1)
    base = str(tmp_path / "base")
    with pytest.raises(MlxSvdError, match="own was evaluated with --num-fewshot 1, now 0"):
        run([path], tmp_path / "out", base=base)
    with pytest.raises(MlxSvdError, match="own was evaluated with --seed 1234, now 5"):
        run([path], tmp_path / "out", base=base, num_fewshot=1, seed=5)
    # 1024 is the context of the model, with or without the option.
    run([path], tmp_path / "out", base=base, num_fewshot=1, max_length=1024)
    with pytest.raises(MlxSvdError, match="own was evaluated with --max-length 1024, now 512"):
        run([path], tmp_path / "short", base=base, num_fewshot=1, max_length=512)


def test_a_base_may_be_the_folder_above(tmp_path, monkeypatch):
    shutil.copytree(DEMO_MODEL, tmp_path / "dense")
    (tmp_path / "dense/below").mkdir()
    monkeypatch.chdir(tmp_path / "dense/below")
    run(["reasoning"], tmp_path / "out", limit=1, base="..")
    assert (tmp_path / "out/base/dense/results.json").is_file()


def test_a_damaged_record_of_a_base_is_named(data, tmp_path):
    run(["facts"], tmp_path / "base", data_dir=data)
    path = tmp_path / "base/samples_facts.jsonl"
    records = read(path)
    del records[2]["acc"]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(MlxSvdError, match=r"samples_facts\.jsonl: line 3 has no number in"):
        run(["facts"], tmp_path / "out", data_dir=data, base=str(tmp_path / "base"))


def test_a_folder_that_is_neither_model_nor_results_is_no_base(data, tmp_path):
    with pytest.raises(MlxSvdError, match=r"--base .*data: holds neither results\.json .* nor"):
        run(["facts"], tmp_path / "out", data_dir=data, base=str(data))


def test_known_facts_get_false_objects_of_their_relation(shared):
    path = shared / "data/facts/known_1000.json"
    facts, again, other = (facts_file(path, seed) for seed in (1, 1, 2))
    assert facts == again != other
    entries = json.loads(path.read_text())
    objects = {}
    for entry in entries:
        objects.setdefault(entry["relation_id"], set()).add(entry["attribute"].strip())
    for fact, entry in zip(facts, entries, strict=True):
        assert fact.object == entry["attribute"].strip()
        assert fact.object not in fact.candidates[1:]
        if len(objects[fact.relation]) > 1:
            assert set(fact.candidates) <= objects[fact.relation]


def test_a_choice_that_flips_is_counted(data, tmp_path, shared):
    row = {"question": "The capital of France is", "choices": ["Rome", "Paris"], "label": 1}
    rows = [row, {**row, "label": 0}, {**row, "question": "The sun is", "choices": ["hot", "cold"]}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = run([path], tmp_path / "out", shared / "models/gpt-neo-8m", base=str(DEMO_MODEL))
    mine, base = (
        read(p / "samples_own.jsonl")
        for p in (tmp_path / "out", tmp_path / "out/base" / DEMO_MODEL.name)
    )
    flips = [float(a["acc"] != b["acc"]) for a, b in zip(mine, base, strict=True)]
    assert [r["flip"] for r in mine] == flips
    assert results["results"]["own"]["flip,none"] == np.mean(flips)
    same = run([path], tmp_path / "same", base=str(DEMO_MODEL))
    assert same["results"]["own"]["flip,none"] == 0


def test_perplexity_is_that_of_single_windows(data, tmp_path, demo):
    model, tokenizer = demo
    results = run(["perplexity"], tmp_path / "out", data_dir=data, max_length=128)
    records = read(tmp_path / "out/samples_perplexity.jsonl")
    stored = (data / "wikitext-2.test.txt").read_text()
    from mlx_svd.evaluate.rows.wikitext import detokenized

    tokens = [tokenizer.bos_token_id, *tokenizer.encode(detokenized(stored), verbose=False)]
    total, first = 0.0, losses(model, tokens[:129]).sum()
    assert records[0]["loglikelihood"] == pytest.approx(-first, abs=1e-2)
    for start in range(0, len(tokens) - 1, 128):
        end = min(start + 128, len(tokens) - 1)
        begin = max(0, end - 128)
        total += losses(model, tokens[begin : end + 1])[-(end - start) :].sum()
    found = results["results"]["perplexity"]
    size, words = len(stored.encode()), len(stored.split()) + 2
    assert found["bits_per_byte,none"] == pytest.approx(total / size / math.log(2), rel=1e-4)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=2e-2)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(total / size), rel=1e-4)
    assert sum(r["num_tokens"] for r in records) == len(tokens) - 1
    for name in ("word_perplexity", "byte_perplexity", "token_perplexity", "bits_per_byte"):
        interval = results["intervals"]["perplexity"][name]
        width = interval["high"] - interval["low"]
        # t of about 25 windows
        assert width / found[f"{name}_stderr,none"] == pytest.approx(2 * 2.06, rel=0.15)


def test_a_text_file_is_a_task(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time there was a man , who lived by the sea.\n" * 20)
    results = run([path], tmp_path / "out", max_length=64)
    assert 1 < results["results"]["story"]["token_perplexity,none"] < 1000


def test_only_replies_are_scored_in_conversations(data, tmp_path, demo):
    model, tokenizer = demo
    run(["conversation"], tmp_path / "out", data_dir=data)
    record = read(tmp_path / "out/samples_conversation.jsonl")[0]
    messages = read(data / "conversations.jsonl")[0]["messages"]
    total, count = 0.0, 0
    for number in (1, 3):
        lines = [f"{m['role'].capitalize()}: {m['content']}" for m in messages[:number]]
        before = tokenizer.encode("\n".join([*lines, "Assistant:"]))
        reply = messages[number]["content"]
        whole = tokenizer.encode("\n".join([*lines, f"Assistant: {reply}"]))
        total += losses(model, whole)[len(before) - 1 :].sum()
        count += len(whole) - len(before)
    assert record["loglikelihood"] == pytest.approx(-total, abs=1e-2)
    assert record["num_tokens"] == count


def test_windows_of_another_tokenizer_or_length_are_not_compared(data, tmp_path, shared):
    outputs = {}
    for name, model, length in (("a", DEMO_MODEL, 256), ("b", shared / "models/llama-44m", 256),
                                ("c", DEMO_MODEL, 128)):  # fmt: skip
        outputs[name] = tmp_path / name
        run(["perplexity"], outputs[name], model, data_dir=data, limit=1, max_length=length)
    for other in ("b", "c"):
        with pytest.raises(MlxSvdError, match="not the same question in both: prompt_hash"):
            compare(outputs["a"], outputs[other])


def test_mmlu_rows_of_two_subjects_with_one_number_are_two_items(shared, tmp_path):
    results = run(["mmlu"], tmp_path / "out", data_dir=shared / "data", limit=20)
    ids = {record["id"] for record in read(tmp_path / "out/samples_mmlu.jsonl")}
    assert len(ids) == results["n-samples"]["mmlu"]["effective"] == 20


HUB_ROWS = {
    "hellaswag": {"ind": 7, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he",
                  "endings": ["eats [step] now", "sleeps", "runs", "sings"], "label": "0"},
    "arc_easy": {"id": "x", "question": "q", "choices": {"text": ["a", "b", "c"],
                 "label": ["1", "2", "3"]}, "answerKey": "2"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "winogrande": {"sentence": "Ann saw Bo as _ ran.", "option1": "Ann", "option2": "Bo",
                   "answer": "2"},
    "mmlu": {"question": "q", "subject": "law", "choices": list("wxyz"), "answer": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub_become_local_rows(name, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    task = CHOICE_TASKS[name]
    config = "default" if task.hub.config == "*" else task.hub.config
    folder = tmp_path / "hub" / config / task.hub.split
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([HUB_ROWS[name]])
    pyarrow.parquet.write_table(table, folder / "0000.parquet")
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    results = run([name], tmp_path / "out")
    assert asked["repo"] == task.hub.repo
    assert results["n-samples"][name]["original"] == 1
    record = read(tmp_path / f"out/samples_{name}.jsonl")[0]
    assert record["target"] == {"hellaswag": 0, "arc_easy": 1, "piqa": 1, "winogrande": 1,
                                "mmlu": 3}[name]  # fmt: skip


def test_a_hub_out_of_reach_offers_local_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MlxSvdError, match=r"baber/piqa: cannot be fetched.*--data-dir"):
        run(["piqa"], tmp_path / "out")
