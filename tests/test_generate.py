"""Two models that complete a prompt: their responses, the output in a terminal or a file, and wrong prompts."""

import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, TEXTS, hf_gpt2, message

import generate
from config import GenerateConfig
from data import encode, train_bpe
from generate import complete, prompt_ids, respond
from model import GPT2, GPT2Config, Policy
from runtime.device import random_generator
from runtime.hub import load_policy, open_gpt2, open_pair, save_gpt2

CFG = GenerateConfig(response_len=40, temperature=1.0)
PROMPT = "I loved"
ESCAPES = "a\x1b[2J b\x07 c\r\x9b31m d\x1b]0;title\x07 e\u202e f\n\n g"  # clear the screen, bell, return, ...
PRINTABLE = "a [2J b c 31m d ]0;title e f g"


def scripted(tokenizer, text):
    """Return a policy that generates text after PROMPT and ends: the position alone determines the next token."""
    first, ids = len(encode([PROMPT], tokenizer)[0]) - 1, encode([text], tokenizer)[0] + [tokenizer.eos_token_id]
    torch.manual_seed(0)
    gpt2 = GPT2(GPT2Config(len(tokenizer), n_positions=160, n_embd=64, n_layer=1, n_head=1)).init_weights()
    with torch.no_grad():
        gpt2.wte.weight.normal_()
        gpt2.wpe.weight[first : first + len(ids)] = 100 * gpt2.wte.weight[ids]
        gpt2.ln_f.weight.fill_(30)
    return Policy(gpt2).eval()


class Judge:
    """A judge that finds the first text negative and the second one positive, and records them."""

    def log_odds(self, texts):
        self.texts = texts
        return torch.tensor([-1.0, 1.0])


def lengths(texts):
    return [float(len(text)) for text in texts]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch, tokenizer):
    """A function that returns what respond prints for two texts to a terminal of 60 columns, or to a file."""

    def run(*texts, terminal=True):
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
        monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
        cfg = GenerateConfig(response_len=120)
        respond(PROMPT, [scripted(tokenizer, text) for text in texts], tokenizer, lengths, Judge(), cfg)
        return sys.stdout.getvalue()

    return run


def columns_of(lines, column=28):
    """Return the text of each of two columns below their titles."""
    assert lines[0].split("   ")[0] == "before PPO" and lines[0].endswith("after PPO")
    return [" ".join(" ".join(line[side] for line in lines[1:]).split()) for side in (slice(column), slice(column, 99))]


# ---- responses


@pytest.fixture(scope="module")
def opened(gpt2_folder):
    """(two policies that differ in one bias, their tokenizer)."""
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    policies = [load_policy(folder, config, tokenizer).eval() for _ in range(2)]
    with torch.no_grad():
        policies[1].gpt2.ln_f.bias += 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return policies, tokenizer


def test_a_response_is_what_generate_gives_with_the_same_seed(opened):
    policies, tokenizer = opened
    ids = encode([PROMPT], tokenizer)[0]
    responses = complete(ids, policies, tokenizer, CFG)
    for policy, response in zip(policies, responses, strict=True):
        generator = random_generator("cpu", CFG.seed)
        sequence = policy.gpt2.generate(torch.tensor([ids]), 40, 1.0, tokenizer.eos_token_id, generator)[0]
        assert PROMPT + response == tokenizer.decode(sequence, skip_special_tokens=True) and len(response) > 20
    assert responses[0] != responses[1]


def test_the_same_prompt_and_seed_give_the_same_response_and_another_seed_another_one(opened):
    policies, tokenizer = opened
    ids = encode([PROMPT], tokenizer)[0]
    first, again, other = (complete(ids, policies, tokenizer, GenerateConfig(seed=seed)) for seed in (3, 3, 4))
    assert first == again and first[0] != other[0]


def test_each_response_ends_with_its_own_end_of_text(tokenizer):
    policies = [scripted(tokenizer, text) for text in ("!", "a great film")]
    assert complete(encode([PROMPT], tokenizer)[0], policies, tokenizer, CFG) == ["!", "a great film"]


def test_prompt_and_response_are_scored_as_one_text(tokenizer, capsys):
    judge, texts = Judge(), []
    policies = [scripted(tokenizer, text) for text in ("!", " it")]
    respond(PROMPT, policies, tokenizer, lambda batch: texts.append(batch) or lengths(batch), judge, CFG)
    assert texts == [judge.texts] == [["I loved!", "I loved it"]]
    assert capsys.readouterr().out.splitlines()[-2].split("   ")[0] == "score +8.00, judge 0.27"  # sigmoid(-1)


# ---- output


BOTH = ("was dull " * 9).strip(), ("was great, " * 9).strip()
RATINGS = " score +87.00, judge 0.27", " score +105.00, judge 0.73"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_responses_are_in_two_columns(shown, terminal):
    lines = shown(*BOTH, terminal=terminal).split("\n")
    assert columns_of(lines) == [BOTH[0] + RATINGS[0], BOTH[1] + RATINGS[1]]
    assert all(len(line) <= 60 for line in lines) and lines[-2:] == ["", ""]


@pytest.mark.parametrize("terminal", [True, False])
def test_generated_text_cannot_control_the_terminal(shown, terminal):
    lines = shown(ESCAPES, "fine", terminal=terminal).split("\n")
    assert all(line.isprintable() for line in lines)
    before, after = columns_of(lines)
    assert before.startswith(PRINTABLE + " score ") and after.startswith("fine score ")


def test_a_character_of_several_tokens_is_printed(shown, tokenizer):
    assert len(encode(["🙂"], tokenizer)[0]) == 4
    assert "a café 🙂 日本" in shown("a café 🙂 日本", "")


# ---- wrong prompts


def test_the_longest_prompt_leaves_room_for_the_response(tokenizer):
    ids = encode([PROMPT], tokenizer)[0]
    fits, short = (GPT2Config(n_positions=len(ids) + n) for n in (40, 39))
    assert prompt_ids(PROMPT, tokenizer, fits, CFG) == ids
    text = message(prompt_ids, PROMPT, tokenizer, short, CFG)
    assert f"{len(ids)} tokens" in text and "response_len 40" in text and f"{len(ids) + 39} positions" in text


@pytest.mark.parametrize(("prompt", "words"), [("", "no tokens"), ("a \udcff", "not UTF-8")])
def test_a_prompt_without_tokens_or_not_in_utf_8_is_refused_in_one_line(tokenizer, prompt, words):
    text = message(prompt_ids, prompt, tokenizer, GPT2Config(), CFG)
    assert words in text and text.isprintable()


def test_a_wrong_prompt_in_a_flag_is_refused_before_weights_are_read(tmp_path, gpt2_folder, bert_folder):
    shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"")
    folders = dict(before=str(tmp_path / "gpt2"), after=str(tmp_path / "gpt2"), judge=str(bert_folder))
    assert "48 positions" in message(generate.main, GenerateConfig(prompt="word " * 50, device="cpu", **folders))


def test_all_models_compute_in_the_dtype_of_the_config(monkeypatch):
    dtypes, model = [], str(ROOT / "asset/mini/gpt2")
    for name in ("load_policy", "load_reward", "load_judge"):
        monkeypatch.setattr(generate, name, lambda *args: dtypes.append(args[-1]) or torch.nn.Identity())
    for name in ("check_finished", "respond"):
        monkeypatch.setattr(generate, name, lambda *_: None)
    generate.main(GenerateConfig(before=model, after=model, prompt=PROMPT, device="cpu", dtype="fp16"))
    assert dtypes == [torch.float16] * 4


def test_two_models_need_one_vocabulary(tmp_path, gpt2_folder, tokenizer):
    """The same size is not enough: the same ids would be other tokens. The context must be the same too."""
    other = train_bpe([text.upper() for text in TEXTS], len(tokenizer))
    assert len(other) == len(tokenizer)
    for name, gpt2, ids in (("short", dict(n_positions=47), tokenizer), ("words", {}, other)):
        hf_gpt2(len(tokenizer), **gpt2).float().save_pretrained(tmp_path / name)
        ids.save_pretrained(tmp_path / name)
    assert "n_positions differs: 48" in message(open_pair, str(gpt2_folder), str(tmp_path / "short"))
    text = message(open_pair, str(gpt2_folder), str(tmp_path / "words"))
    assert "have different tokenizers" in text and str(gpt2_folder) in text and str(tmp_path / "words") in text
    assert list(open_pair(str(gpt2_folder), str(gpt2_folder))) == ["before", "after"]


# ---- whole runs


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer, bert_folder):
    """The command line for two models that generate ESCAPES and "a café 🙂"."""
    folders = [tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")]
    for folder, text in zip(folders, (ESCAPES, "a café 🙂")):
        save_gpt2(scripted(tokenizer, text).gpt2, tokenizer, folder)
    (folders[0] / "mine.py").write_text("def length(texts):\n    return [len(text) for text in texts]\n")
    names = dict(before=folders[0], after=folders[1], reward=f"{folders[0]}/mine.py:length", judge=bert_folder)
    flags = [text for name, value in names.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "generate.py"), *flags, "--device", "cpu", "--response_len", "100"]


def environment():
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm",
        "OMP_NUM_THREADS": "1",
    }


def test_the_lines_of_a_pipe_are_completed_until_an_empty_one(command):
    """A wrong prompt is an error of one line, and the next one is read."""
    lines = [PROMPT.encode(), b"\xff", b"word " * 60, PROMPT.encode(), b"", b"never read"]
    done = subprocess.run(command, input=b"\n".join(lines), capture_output=True, env=environment())
    errors, output = done.stderr.decode().splitlines(), done.stdout.decode()
    assert done.returncode == 0
    assert len(errors) == 2 and "not UTF-8" in errors[0] and "160 positions" in errors[1]
    assert all(error.startswith("error: ") for error in errors)
    caption, *parts = re.split("^> ", output, flags=re.MULTILINE)
    assert "probability of POSITIVE" in caption and len(parts) == 4
    assert parts[0] == parts[3] and "a café 🙂" in parts[0] and parts[0].startswith(f"{PROMPT}\nbefore PPO ")
    assert "\x1b" not in output and "never read" not in output


def end_of(pid, terminal, seconds=100):
    """Return the status of a process that is about to end. If it does not, kill it.

    Press Ctrl-C in its terminal every five seconds: Python misses one between the prompt and the wait for a line.
    """
    for i in range(10 * seconds):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if i % 50 == 49:
            os.write(terminal, b"\x03")
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def test_a_terminal_shows_prompts_and_responses_until_ctrl_c(command):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if a shell runs the tests in the background
        os.execve(command[0], command, environment())
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    output = b""
    for line in ("", f"{PROMPT}\n", "word " * 9 + "\n", "word " * 60 + "\n"):
        os.write(terminal, line.encode())
        start = len(output)
        while output.count(b"\n", start) < 2 or not output.endswith((b"> ", b"> \x1b[?2004h")):  # the next prompt
            assert select.select([terminal], [], [], 300)[0], output
            output += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    status = end_of(pid, terminal)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    lines = output.decode().replace("\x1b[?2004h", "").replace("\x1b[?2004l", "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(f"> {PROMPT}"))
    assert "an empty line ends" in lines[start - 1]
    first = next(i for i, line in enumerate(lines) if line.startswith("before PPO"))
    before, after = columns_of(lines[first : lines.index("", first)])
    assert before.startswith(f"{PRINTABLE} score +") and after.startswith("a café 🙂 score +15.00, judge ")
    assert sum(line.startswith("error: the prompt has ") for line in lines) == 1
