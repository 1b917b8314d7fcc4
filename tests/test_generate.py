"""Two models that go on with a prompt: what they write, what a terminal shows of it, and what a wrong prompt says."""

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
from generate import answer, complete, prompt_ids
from model import GPT2, GPT2Config, Policy
from runtime.device import random_generator
from runtime.hub import load_policy, open_gpt2, open_pair, save_gpt2

CFG = GenerateConfig(response_len=40, temperature=1.0)
PROMPT = "I loved"
ESCAPES = "a\x1b[2J b\x07 c\r\x9b31m d\x1b]0;title\x07 e\u202e f\n\n g"  # clears the screen, rings, goes back, ...
WRITTEN = "a [2J b c 31m d ]0;title e f g"


def scripted(tokenizer, text):
    """A policy that writes text behind PROMPT and ends, whatever is drawn: the position alone says what comes next."""
    first, ids = len(encode([PROMPT], tokenizer)[0]) - 1, encode([text], tokenizer)[0] + [tokenizer.eos_token_id]
    torch.manual_seed(0)
    gpt2 = GPT2(GPT2Config(len(tokenizer), n_positions=160, n_embd=64, n_layer=1, n_head=1)).init_weights()
    with torch.no_grad():
        gpt2.wte.weight.normal_()
        gpt2.wpe.weight[first : first + len(ids)] = 100 * gpt2.wte.weight[ids]
        gpt2.ln_f.weight.fill_(30)
    return Policy(gpt2).eval()


class Judge:
    """Finds the first text negative and the second one positive; remembers what it was asked."""

    def log_odds(self, texts):
        self.asked = texts
        return torch.tensor([-1.0, 1.0])


def lengths(texts):
    return [float(len(text)) for text in texts]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text, rows=24):
    """The lines that a terminal shows of a text, those that it scrolled away included.

    It knows what generate.py and readline may send, and fails at any other control character.
    """
    lines, x, y, top = [""], 0, 0, 0
    for escape, number, letter, char in re.findall(r"(\x1b\[\??(\d*)([a-zA-Z]))|(.)", text, re.DOTALL):
        if letter == "A":
            y = max(top, y - int(number))
        elif letter in ("J", "K") and escape:
            lines[y] = lines[y][:x]
            if letter == "J":
                del lines[y + 1 :]
        elif char == "\n":
            x, y = 0, y + 1
            lines += [""] * (y == len(lines))
            top = max(top, y - rows + 1)
        elif char in ("\r", "\b") and char:
            x = 0 if char == "\r" else x - 1
        elif char:
            assert char.isprintable(), f"{char!r} reached the terminal"
            lines[y], x = lines[y][:x].ljust(x) + char + lines[y][x + 1 :], x + 1
        else:
            assert letter == "m" or escape in ("\x1b[?7l", "\x1b[?7h", "\x1b[?2004h", "\x1b[?2004l"), escape
    return [line.rstrip() for line in lines]


@pytest.fixture
def shown(monkeypatch, tokenizer):
    """What answer sends to a terminal (or, live=False, to a file) of two texts that models write."""

    def run(*texts, live=True, rows=24, **environment):
        for name, value in (dict(TERM="xterm", NO_COLOR="", FORCE_COLOR=None) | environment).items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, rows)))
        monkeypatch.setattr(sys, "stdout", Terminal() if live else io.StringIO())
        cfg = GenerateConfig(response_len=120)
        answer(PROMPT, [scripted(tokenizer, text) for text in texts], tokenizer, lengths, Judge(), cfg)
        return sys.stdout.getvalue()

    return run


def columns_of(lines, column=28):
    """The words of each of two columns under their titles."""
    assert lines[0].split("   ")[0] == "before PPO" and lines[0].endswith("after PPO")
    return [" ".join(" ".join(line[side] for line in lines[1:]).split()) for side in (slice(column), slice(column, 99))]


# ---- what the models write


@pytest.fixture(scope="module")
def opened(gpt2_folder):
    """(two policies that differ in one bias, their tokenizer)"""
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    policies = [load_policy(folder, config, tokenizer).eval() for _ in range(2)]
    with torch.no_grad():
        policies[1].gpt2.ln_f.bias += 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return policies, tokenizer


def test_what_has_grown_in_the_end_is_what_generate_gives_with_the_same_seed(opened):
    """And it only grew, but for letters that were not whole yet."""
    policies, tokenizer = opened
    ids = encode([PROMPT], tokenizer)[0]
    steps = list(complete(ids, policies, tokenizer, CFG))
    for side, policy in enumerate(policies):
        generator = random_generator("cpu", CFG.seed)
        whole = policy.gpt2.generate(torch.tensor([ids]), 40, 1.0, tokenizer.eos_token_id, generator)[0]
        texts = [step[side] for step in steps]
        assert PROMPT + texts[-1] == tokenizer.decode(whole, skip_special_tokens=True) and len(texts[-1]) > 20
        assert all(later.startswith(text.rstrip("\ufffd")) for text, later in zip(texts, texts[1:]))
    assert steps[0] == ["", ""] and steps[-1][0] != steps[-1][1]


def test_the_same_prompt_and_seed_have_the_same_answer_and_another_seed_another(opened):
    policies, tokenizer = opened
    ids = encode([PROMPT], tokenizer)[0]
    first, again, other = (
        list(complete(ids, policies, tokenizer, GenerateConfig(seed=seed)))[-1] for seed in (3, 3, 4)
    )
    assert first == again and first[0] != other[0]


def test_a_model_that_ends_first_waits_and_none_goes_on_behind_its_end(tokenizer):
    policies = [scripted(tokenizer, text) for text in ("!", "a great film")]
    steps = list(complete(encode([PROMPT], tokenizer)[0], policies, tokenizer, CFG))
    assert steps[-1] == ["!", "a great film"] and steps[1][0] == "!" and steps[1][1] != "a great film"
    assert len(steps) == 1 + len(encode(["a great film"], tokenizer)[0])  # the longer one's, not up to STOP_CHECK


def test_prompt_and_response_are_scored_as_one_text(tokenizer, capsys):
    judge, asked = Judge(), []
    policies = [scripted(tokenizer, text) for text in ("!", " it")]
    answer(PROMPT, policies, tokenizer, lambda texts: asked.append(texts) or lengths(texts), judge, CFG)
    assert asked == [judge.asked] == [["I loved!", "I loved it"]]
    assert capsys.readouterr().out.splitlines()[-2].split("   ")[0] == "score +8.00, judge 0.27"  # sigmoid(-1)


# ---- what is shown of it


BOTH = ("was dull " * 9).strip(), ("was great, " * 9).strip()
TOLD = " score +87.00, judge 0.27", " score +105.00, judge 0.73"


@pytest.mark.parametrize("live", [True, False])
def test_both_answers_stand_in_two_columns_and_a_file_holds_no_escape_codes(shown, live):
    text = shown(*BOTH, live=live)
    lines = screen(text)
    assert columns_of(lines) == [BOTH[0] + TOLD[0], BOTH[1] + TOLD[1]]
    assert all(len(line) <= 60 for line in lines) and lines[-2:] == ["", ""]
    assert ("\x1b" in text) == live


def test_a_terminal_shows_every_token_as_it_comes(shown, tokenizer):
    text = shown("great", "great")
    ids = encode(["great"], tokenizer)[0]
    assert len(ids) > 1
    assert all(f"{tokenizer.decode(ids[: i + 1]):<28}    " in text for i in range(len(ids)))


@pytest.mark.parametrize("rows", [2, 4, 5, 24])
def test_an_answer_that_is_higher_than_the_terminal_is_whole_in_the_end(shown, rows):
    """Without room for it the cursor would stop at the top edge, and lines would be there twice."""
    assert columns_of(screen(shown(*BOTH, rows=rows), rows)) == [BOTH[0] + TOLD[0], BOTH[1] + TOLD[1]]


@pytest.mark.parametrize("live", [True, False])
def test_nothing_that_a_model_writes_moves_the_cursor(shown, live):
    """Not even what it had written before it was done."""
    before, after = columns_of(screen(shown(ESCAPES, "fine", live=live)))
    assert before.startswith(WRITTEN + " score ") and after.startswith("fine score ")


def test_a_letter_that_comes_in_several_tokens_is_shown_when_it_is_whole(shown, tokenizer):
    text = "a café 🙂 日本"
    assert len(encode(["🙂"], tokenizer)[0]) == 4
    for live in (True, False):
        told = shown(text, "", live=live)
        assert "\ufffd" not in told and text in told


@pytest.mark.parametrize("no_color", ["", "1"])
def test_what_the_judge_finds_positive_is_green_and_the_rest_red(shown, no_color):
    text = shown("dull", "great", NO_COLOR=no_color)
    assert ("\x1b[31mdull\x1b[0m " in text and "\x1b[32mgreat\x1b[0m\n" in text) == (not no_color)
    assert ("\x1b[31m" in text or "\x1b[32m" in text) == (not no_color)
    assert "\x1b[1A" in text  # the cursor goes back either way


def test_a_terminal_that_cannot_move_its_cursor_is_not_told_to(shown):
    text = shown(*BOTH, TERM="dumb", NO_COLOR="1")
    assert "\x1b" not in text and columns_of(screen(text)) == [BOTH[0] + TOLD[0], BOTH[1] + TOLD[1]]


# ---- what cannot be answered


def test_the_longest_prompt_leaves_room_for_the_response(tokenizer):
    ids = encode([PROMPT], tokenizer)[0]
    fits, short = (GPT2Config(n_positions=len(ids) + n) for n in (40, 39))
    assert prompt_ids(PROMPT, tokenizer, fits, CFG) == ids
    text = message(prompt_ids, PROMPT, tokenizer, short, CFG)
    assert f"{len(ids)} tokens" in text and "response_len 40" in text and f"{len(ids) + 39} positions" in text


@pytest.mark.parametrize(("prompt", "named"), [("", "no tokens"), ("a \udcff", "not UTF-8")])
def test_a_prompt_without_tokens_or_of_other_bytes_is_one_line(tokenizer, prompt, named):
    text = message(prompt_ids, prompt, tokenizer, GPT2Config(), CFG)
    assert named in text and text.isprintable()


def test_a_wrong_prompt_in_a_flag_is_refused_before_weights_are_read(tmp_path, gpt2_folder, bert_folder):
    shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"")
    folders = dict(before=str(tmp_path / "gpt2"), after=str(tmp_path / "gpt2"), judge=str(bert_folder))
    assert "48 positions" in message(generate.main, GenerateConfig(prompt="word " * 50, device="cpu", **folders))


def test_two_models_need_one_vocabulary(tmp_path, gpt2_folder, tokenizer):
    """Of one size too: the same ids would be other words."""
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
    """The command line for two models that write ESCAPES and "a café 🙂"."""
    folders = [tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")]
    for folder, text in zip(folders, (ESCAPES, "a café 🙂")):
        save_gpt2(scripted(tokenizer, text).gpt2, tokenizer, folder)
    (folders[0] / "mine.py").write_text("def length(texts):\n    return [len(text) for text in texts]\n")
    names = dict(before=folders[0], after=folders[1], reward=f"{folders[0]}/mine.py:length", judge=bert_folder)
    flags = [text for name, value in names.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "generate.py"), *flags, "--device", "cpu", "--response_len", "100"]


def environment():
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | {
        "TERM": "xterm",
        "OMP_NUM_THREADS": "1",
    }


def test_lines_of_a_pipe_are_answered_one_by_one_until_an_empty_one(command):
    """What cannot be answered is a line on stderr, and the next one is read."""
    lines = [PROMPT.encode(), b"\xff", b"word " * 60, PROMPT.encode(), b"", b"never read"]
    done = subprocess.run(command, input=b"\n".join(lines), capture_output=True, env=environment())
    errors, told = done.stderr.decode().splitlines(), done.stdout.decode()
    assert done.returncode == 0
    assert len(errors) == 2 and "not UTF-8" in errors[0] and "160 positions" in errors[1]
    assert all(error.startswith("error: ") for error in errors)
    caption, *asked = re.split("^> ", told, flags=re.MULTILINE)
    assert "probability of POSITIVE" in caption and len(asked) == 4
    assert asked[0] == asked[3] and "a café 🙂" in asked[0] and asked[0].startswith(f"{PROMPT}\nbefore PPO ")
    assert "\x1b" not in told and "never read" not in told


def end_of(pid, seconds=100):
    """The status of a process that is about to end; one that does not is killed, which the status then says."""
    for _ in range(10 * seconds):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def test_a_terminal_shows_prompts_and_answers_in_turn_until_ctrl_c(command):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell runs the tests in the background
        os.execve(command[0], command, environment())
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
    told = b""
    for line in ("", f"{PROMPT}\n", "word " * 60 + "\n"):
        os.write(terminal, line.encode())
        seen = len(told)
        while told.count(b"\n", seen) < 2 or not told.endswith((b"> ", b"> \x1b[?2004h")):  # until it asks again
            assert select.select([terminal], [], [], 300)[0], told
            told += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    status = end_of(pid)
    os.close(terminal)
    lines = screen(told.decode())
    start = lines.index(f"> {PROMPT}")
    assert os.waitstatus_to_exitcode(status) == 130
    assert "an empty line ends" in lines[start - 1]
    end = lines.index("", start)
    before, after = columns_of(lines[start + 1 : end])
    assert before.startswith(f"{WRITTEN} score +") and after.startswith("a café 🙂 score +15.00, judge ")
    assert sum(line.startswith("error: the prompt has ") for line in lines[end:]) == 1 and lines[-1] == ">"
