"""`make full` and the other commands of preset gpt2, with the real hub client and a hub server on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, message
from hub_server import Hub, write_repositories
from huggingface_hub import constants
from safetensors.torch import load, save

from config import EvaluateConfig, GenerateConfig, PPOConfig
from data import load_splits
from runtime.hub import locate

GPT2, IMDB = "openai-community/gpt2", "stanfordnlp/imdb"
BERT_IMDB, SIEBERT = "lvwerra/bert-imdb", "siebert/sentiment-roberta-large-english"
FLAGS = {  # of make full; they only make it shorter, and save a checkpoint after each step
    "FLAGS": "--device cpu",
    "FINETUNE": "--epochs 0.06 --block_size 64 --batch_size 8 --eval_tokens 2000 --save_every 1 --save_share 1",
    "PPO": "--steps 8 --batch_size 32 --minibatch_size 32 --save_every 1 --save_share 1",
    "EVALUATE": "--prompts 16",
}
FINE_TUNED, TRAINED = "finetune_checkpoints/gpt2", "ppo_checkpoints/gpt2"
KILLS = {  # make full is killed in each stage, as soon as a file exists: (file, one that does not exist yet)
    "fine-tuning": (f"{FINE_TUNED}/checkpoints/[0-9]*1", f"{FINE_TUNED}/results.json"),
    "PPO": (f"{TRAINED}/checkpoints/[0-9]*1", f"{TRAINED}/model.safetensors"),
    "evaluation": (f"{TRAINED}/results.json", f"{TRAINED}/report.html"),
}
EVALUATED = [
    "results.json",
    "viewer.json",
    "samples.md",
    "example_results.png",
    "learning_curves.png",
    "report.html",
    "README.md",
]
OTHERS = {"reward.py": "--epochs 1", "generate.py": ""}
NEEDED = {  # every file that the commands read
    GPT2: "config.json merges.txt model.safetensors tokenizer.json tokenizer_config.json vocab.json",
    "google-bert/bert-base-cased": "config.json model.safetensors tokenizer.json tokenizer_config.json vocab.txt",
    BERT_IMDB: "config.json pytorch_model.bin special_tokens_map.json tokenizer_config.json vocab.txt",
    SIEBERT: "config.json merges.txt pytorch_model.bin special_tokens_map.json tokenizer_config.json vocab.json",
    f"datasets/{IMDB}": ".gitattributes README.md plain_text/test-00000-of-00001.parquet "
    "plain_text/train-00000-of-00001.parquet plain_text/unsupervised-00000-of-00001.parquet",
}
TOKENIZER = {f"{GPT2}/{file}" for file in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")}
NOWHERE = "http://127.0.0.1:9"  # a port that nothing listens on


@pytest.fixture(scope="module")
def repositories():
    return write_repositories()


def run(command, hub, home, folder, stdin="", **environment):
    """Run a script in a folder with its cache in `home`; return its CompletedProcess with an attribute `seconds`."""
    script, *flags = command.split()
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags, "--device", "cpu"],
        cwd=folder,
        env=hub.environment(home, **environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    done.seconds = time.monotonic() - start
    return done


def error_line(done):
    """Return the only line on stderr, besides progress bars, of a script that ended with BadInput."""
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "it/s]" not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


# ---- an empty cache


class Run:
    """All commands in order: their processes, and the files and requests of the hub.

    make full is killed in each stage, started again until it ends, and then once more. outputs: of these five processes
    of make, by "fine-tuning", "PPO", "evaluation", "end" and "again"; stored: {path: bytes} after each of them.
    """

    def __init__(self, hub, home, folder):
        self.hub, self.home, self.folder, self.done, self.requests = hub, home, folder, {}, {}
        for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("Makefile", "runtime", "analysis", "asset"))]:
            (folder / path.name).symlink_to(path)
        self.outputs, self.stored = {}, {}
        for name in (*KILLS, "end", "again"):
            before = len(hub.requests)
            self.outputs[name] = self.make_full(*KILLS.get(name, ()))
            self.requests[name] = hub.requests[before:]
            files = [path for parent in (FINE_TUNED, TRAINED) for path in (folder / parent).glob("*.*")]
            self.stored[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        for script, flags in OTHERS.items():
            before = len(hub.requests)
            self.done[script] = run(f"{script} {flags}", hub, home, folder, stdin="The film was\n")
            self.requests[script] = hub.requests[before:]
        self.sent = list(hub.sent)

    def make_full(self, file="", missing=""):
        """Run make full, which must succeed; or kill it when a file exists. Return its output."""
        arguments = [f"{name}={value}" for name, value in {"BIN": Path(sys.executable).parent, **FLAGS}.items()]
        command = ["make", "-o", ".venv/run-time", "full", *arguments]  # -o: install nothing
        log, env = self.folder / "output", self.hub.environment(self.home)
        for name in ("MAKELEVEL", "MAKEFLAGS"):  # set by `make test`: make would also print which folder it leaves
            env.pop(name, None)
        with open(log, "w") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=output, stderr=output, start_new_session=True
            )
        end = time.monotonic() + 200
        while process.poll() is None and not (file and list(self.folder.glob(file))) and time.monotonic() < end:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        text, code = log.read_text(), process.wait()
        assert code == (-signal.SIGKILL if file else 0), text[-3000:]
        assert not missing or not (self.folder / missing).exists(), text[-3000:]
        return text

    def revisions(self, out):
        """Return the commits in the config of a run, {name: commit}."""
        return json.loads((self.folder / out / "run_config.json").read_text())["revisions"]

    def commits(self, *names):
        """Return the commits on the hub, {name: commit}."""
        real = {"gpt2": GPT2, "bert-base-cased": "google-bert/bert-base-cased"}
        kinds = {name: "datasets" if name == IMDB else "models" for name in names}
        return {name: self.hub.find(kind, real.get(name, name), "main").commit for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def full_run(repositories, tmp_path_factory):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    with Hub(repositories) as hub:
        yield Run(hub, tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("run"))


def test_make_full_runs_all_stages_and_its_last_lines_say_where_the_results_are_and_how_to_publish_them(full_run):
    for name in ("end", "again"):
        output = full_run.outputs[name].split("written:\n")[1].splitlines()
        assert output[:-2] == [f"  {TRAINED}/{file}" for file in EVALUATED]
        assert output[-2:] == ["to publish it, after hf auth login:", f"  hf upload USER/NAME {TRAINED}"]
    assert all((full_run.folder / TRAINED / file).stat().st_size > 0 for file in EVALUATED)


def test_make_full_resumes_the_stage_that_was_killed(full_run):
    """Fine-tuning and PPO from their checkpoints. An evaluation that was killed while it was written is repeated."""
    outputs = full_run.outputs
    assert re.findall("resuming from (.*)/", outputs["PPO"]) == [f"{FINE_TUNED}/checkpoints"]
    assert re.findall("resuming from (.*)/", outputs["evaluation"]) == [f"{TRAINED}/checkpoints"]
    assert "resuming" not in outputs["fine-tuning"] + outputs["end"] + outputs["again"]
    assert "held-out prompts" in outputs["end"] and "held-out prompts" not in outputs["again"]


def test_make_full_never_changes_what_is_finished(full_run):
    stored = full_run.stored
    fine_tuned = {name: data for name, data in stored["PPO"].items() if name.startswith(FINE_TUNED)}
    trained = {  # without the files of evaluate.py, which was killed while it wrote one of them
        name: data for name, data in stored["evaluation"].items() if not any(file in name for file in EVALUATED)
    }
    assert f"{FINE_TUNED}/model.safetensors" in fine_tuned and f"{TRAINED}/model.safetensors" in trained
    assert fine_tuned.items() <= stored["evaluation"].items() and trained.items() <= stored["end"].items()
    assert stored["again"] == stored["end"] and not [name for name in stored["end"] if name.endswith(".tmp")]


def test_a_run_of_make_full_that_is_finished_needs_no_network(full_run):
    assert full_run.requests["again"] == []
    rows = re.findall("^  (.*)  finished: (.*)$", full_run.outputs["again"], re.MULTILINE)
    assert [folder for _, folder in rows] == [FINE_TUNED, TRAINED, TRAINED]


@pytest.mark.parametrize("script", OTHERS)
def test_a_command_works_with_its_defaults(full_run, script):
    done = full_run.done[script]
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_the_needed_files_are_downloaded_each_once(full_run):
    """No TensorFlow, Flax, Rust, TFLite or ONNX files, and only one format of the weights."""
    needed = [f"{name}/{file}" for name, files in NEEDED.items() for file in files.split()]
    assert sorted(full_run.sent) == sorted(needed)


def test_models_in_the_cache_cause_no_requests(full_run):
    """generate.py loads the reward and the judge that ppo.py downloaded."""
    assert full_run.requests["generate.py"] == []


@pytest.mark.parametrize(
    "out, names",
    [
        ("finetune_checkpoints/gpt2", ["gpt2", IMDB]),
        ("reward_checkpoints/gpt2", ["bert-base-cased", IMDB]),
        ("ppo_checkpoints/gpt2", [BERT_IMDB, SIEBERT, IMDB]),
    ],
)
def test_a_run_records_the_commits_of_models_and_dataset_from_the_hub(full_run, out, names):
    assert full_run.revisions(out) == full_run.commits(*names)


def test_the_dataset_s_own_test_part_is_the_evaluation_split(full_run):
    results = json.loads((full_run.folder / "reward_checkpoints/gpt2/judge/results.json").read_text())
    assert results["held_out"] == 200


def test_the_positive_labels_of_reward_and_judge_are_found(full_run):
    """LABEL_1 of lvwerra/bert-imdb, which has no label names, and POSITIVE of the judge, checked by probe sentences."""
    gaps = re.findall(r"probe sentences ([-\d.]+) log-odds apart", full_run.outputs["end"])  # of the evaluation
    assert len(gaps) == 2 and min(map(float, gaps)) > 1


def test_all_scripts_have_the_same_judge_from_a_third_party():
    assert {PPOConfig().judge, EvaluateConfig().judge, GenerateConfig().judge} == {SIEBERT}


def test_generate_shows_a_score_and_the_judge_s_probability_for_both_models(full_run):
    out = full_run.done["generate.py"].stdout
    assert len(re.findall(r"score [-+]\d+\.\d\d, judge [01]\.\d\d", out)) == 2


# ---- a full cache and no network


def test_generate_prints_the_same_responses_offline(full_run):
    done = run("generate.py", full_run.hub, full_run.home, full_run.folder, "The film was\n", HF_HUB_OFFLINE="1")
    assert done.stdout == full_run.done["generate.py"].stdout, done.stderr
    assert done.seconds < 30


def test_evaluate_reads_dataset_and_models_from_the_cache_if_the_hub_cannot_be_reached(full_run):
    flags = f"{FLAGS['EVALUATE']} --force"
    done = run(f"evaluate.py {flags}", full_run.hub, full_run.home, full_run.folder, HF_ENDPOINT=NOWHERE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.seconds < 60


def test_ppo_needs_no_positive_label_for_the_classifiers_of_reward_py(full_run):
    """Without the self-check: a tiny encoder learns nothing in an epoch."""
    command = "ppo.py --reward reward_checkpoints/gpt2/reward --judge reward_checkpoints/gpt2/judge --self_check False"
    short = "--out own --steps 1 --batch_size 16 --minibatch_size 16"
    done = run(f"{command} {short}", full_run.hub, full_run.home, full_run.folder, HF_ENDPOINT=NOWHERE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert full_run.revisions("own") == full_run.commits(IMDB)


# ---- a partial cache


def download_as_transformers(hub, home):
    """Fill the cache like AutoModel.from_pretrained("gpt2"): no tokenizer, no list of the files."""
    code = "from huggingface_hub import hf_hub_download as get; get('gpt2', 'config.json'); get('gpt2', '{}')"
    subprocess.run(
        [sys.executable, "-c", code.format("model.safetensors")], env=hub.environment(home), check=True, timeout=60
    )


def test_a_cache_without_the_tokenizer_is_completed_from_the_hub_and_refused_offline(repositories, tmp_path):
    """The second run downloads the tokenizer, and ends because of its dataset, which is read after the model."""
    with Hub(repositories) as hub:
        download_as_transformers(hub, tmp_path)
        line = error_line(run("finetune_gpt2.py", hub, tmp_path, tmp_path, HF_HUB_OFFLINE="1"))
        assert "gpt2" in line and "tokenizer.json" in line
        hub.sent.clear()
        line = error_line(run("finetune_gpt2.py --dataset none.csv", hub, tmp_path, tmp_path))
        assert "none.csv" in line
        assert set(hub.sent) == TOKENIZER and len(hub.sent) == len(TOKENIZER)


# ---- errors of the hub


@pytest.mark.parametrize(
    "script, name, failure, reason",
    [
        ("finetune_gpt2.py", GPT2, 401, "401"),
        ("finetune_gpt2.py", GPT2, 503, "503"),
        ("finetune_gpt2.py", GPT2, "hang", "timed out"),
        ("reward.py", IMDB, 404, "404"),
    ],
)
def test_a_script_ends_within_seconds_and_with_one_line_if_the_hub_fails(
    repositories, tmp_path, script, name, failure, reason
):
    with Hub(repositories) as hub:
        hub.failures[name] = failure
        done = run(script, hub, tmp_path, tmp_path, HF_HUB_ETAG_TIMEOUT="1")
    line = error_line(done)
    assert f"'{'gpt2' if name == GPT2 else name}'" in line and reason in line
    assert done.seconds < 20


# ---- this process as the client


@pytest.fixture
def client(repositories, tmp_path, monkeypatch):
    """A hub server, with this process as its client with an empty cache."""
    monkeypatch.chdir(tmp_path)
    with Hub(repositories) as hub:
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub"), "ENDPOINT": hub.url}
        for name, value in (values | {"HUGGINGFACE_CO_URL_TEMPLATE": url}).items():
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.mark.parametrize(
    "failure, reason",
    [
        (401, "401 Unauthorized: no such repository"),
        (403, "access is restricted"),
        (404, "404 Not Found: no such repository"),
        (429, "429 Too Many Requests"),
        (500, "500 Internal Server Error"),
        (503, "503 Service Unavailable"),
        ("close", "Server disconnected"),
    ],
)
@pytest.mark.parametrize("load, name", [(locate, "gpt2"), (load_splits, IMDB)], ids=["model", "dataset"])
def test_an_error_of_the_hub_is_reported_in_one_line_with_the_name_and_the_reason(client, load, name, failure, reason):
    client.failures[""] = failure
    start = time.monotonic()
    text = message(load, name)
    assert time.monotonic() - start < 5
    assert repr(name) in text and reason in text and "--preset mini" in text


def test_the_error_for_a_gated_file_tells_how_to_get_access(client):
    """The list of files of a gated repository is public."""
    client.failures[f"{GPT2}/model.safetensors"] = 403
    text = message(locate, "gpt2")
    assert "'gpt2'" in text and "accept the terms" in text and "hf auth login" in text


def test_a_name_that_is_not_on_the_hub_is_refused(client):
    assert "'nobody/nothing'" in message(locate, "nobody/nothing")
    assert "'nobody/nothing'" in message(load_splits, "nobody/nothing")


def test_an_interrupted_download_is_completed(client, repositories):
    client.broken.add("model.safetensors")
    weights = locate("gpt2") / "model.safetensors"
    assert weights.read_bytes() == repositories["models", GPT2]["model.safetensors"]


def test_a_download_that_failed_is_completed_by_the_next_run(client):
    client.failures[f"{GPT2}/model.safetensors"] = "close"
    assert "Server disconnected" in message(locate, "gpt2")
    client.failures.clear()
    client.sent.clear()
    locate("gpt2")
    assert f"{GPT2}/model.safetensors" in client.sent
    client.sent.clear()
    locate("gpt2")
    assert client.sent == []


def test_a_download_of_the_dataset_that_failed_is_completed_by_the_next_run(client):
    """Otherwise the evaluation split would be a part of the training reviews."""
    client.failures[f"{IMDB}/plain_text/test-00000-of-00001.parquet"] = "close"
    assert "Server disconnected" in message(load_splits, IMDB)
    client.failures.clear()
    assert len(load_splits(IMDB)["evaluation"].texts) == 200


@pytest.mark.parametrize("cached", [True, False], ids=["a shard", "no shard"])
def test_a_sharded_model_that_is_partly_in_the_cache_is_completed(client, repositories, cached):
    """Only its index lists the files that belong to it."""
    files, shard = dict(repositories["models", GPT2]), "model-00002-of-00002.safetensors"
    weights = load(files.pop("model.safetensors"))
    names = {name: shard if i % 2 else shard.replace("00002-of", "00001-of") for i, name in enumerate(weights)}
    for file in sorted(set(names.values())):
        files[file] = save({name: weights[name] for name in weights if names[name] == file})
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    client.add_revision("models", GPT2, "shards", files)
    missing = [shard] if cached else sorted(set(names.values()))
    for file in missing:
        client.failures[f"{GPT2}/{file}"] = "close"
    assert "Server disconnected" in message(locate, "gpt2@shards")
    client.failures.clear()
    assert all((locate("gpt2@shards") / file).is_file() for file in missing)


def test_a_dataset_that_cannot_be_read_is_refused_in_one_line(client, repositories):
    name = "plain_text/train-00000-of-00001.parquet"
    files = repositories["datasets", IMDB]
    client.add_revision("datasets", IMDB, "main", files | {name: files[name][:1000]})
    text = message(load_splits, IMDB)
    assert f"dataset {IMDB!r}" in text and "cannot be read" in text


def test_a_name_can_end_in_a_revision(client, repositories):
    """A tag, a branch or a commit; the default is the branch main."""
    files = repositories["models", GPT2]
    client.add_revision("models", GPT2, "v1", files | {"generation_config.json": b"{}"})
    commits = {revision: client.find("models", GPT2, revision).commit for revision in ("main", "v1")}
    assert commits["main"] != commits["v1"]
    assert locate("gpt2").name == locate("gpt2@main").name == commits["main"]
    assert locate("gpt2@v1").name == locate(f"gpt2@{commits['v1']}").name == commits["v1"]
    assert "'gpt2@v2'" in message(locate, "gpt2@v2")


def test_the_name_of_a_dataset_can_end_in_a_revision(client, repositories):
    files = dict(repositories["datasets", IMDB])
    parts = [f"plain_text/{part}-00000-of-00001.parquet" for part in ("train", "test")]
    swapped = files | {parts[0]: files[parts[1]], parts[1]: files[parts[0]], "README.md": card_without_sizes(files)}
    client.add_revision("datasets", IMDB, "v1", swapped)
    assert len(load_splits(f"{IMDB}@v1")["evaluation"].texts) == 1800
    assert len(load_splits(IMDB)["evaluation"].texts) == 200


def card_without_sizes(files):
    """Return the dataset card without dataset_info, since datasets compares its numbers of rows."""
    card = files["README.md"].decode()
    return (card[: card.index("dataset_info:")] + card[card.index("configs:") :]).encode()
