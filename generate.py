"""Type the beginning of a review: the models before and after PPO go on with it, side by side, token by token.

    python generate.py
    python generate.py --preset mini
    python generate.py --preset mini --prompt "The first half hour"    # one answer
    python generate.py --preset mini < prompts.txt                     # one to each line

An empty line or the end of the input (Ctrl-D) ends it. Under each answer stand its score by the reward and the judge's
probability of POSITIVE. On a terminal the columns fill while the models write; elsewhere they are printed when done.
"""

import contextlib
import itertools
import os
import shutil
import sys

import torch

from checkpoint import check_finished
from config import BadInput, GenerateConfig, print_error, printable, run
from data import encode
from device import pick_device, random_generator
from hub import load_policy, open_pair
from log import SIDES, column_width, columns, tint
from reward import as_scores, check_finite, load_judge, load_reward


def prompt_ids(prompt, tokenizer, config, cfg):
    """The ids of a prompt, a list of P; BadInput where it has none, or too many for a response behind them."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # what Python makes of other bytes in a flag or a line
        raise BadInput(f"prompt {prompt!a} is not UTF-8") from None
    ids = encode([prompt], tokenizer)[0]
    if not ids:
        raise BadInput(f"prompt {prompt!r} has no tokens")
    if len(ids) + cfg.response_len > config.n_positions:
        raise BadInput(
            f"the prompt has {len(ids)} tokens: with response_len {cfg.response_len} that is over the model's "
            f"{config.n_positions} positions"
        )
    return ids


def growing_answers(ids, policies, tokenizer, cfg):
    """Yield the responses to a prompt with these ids, a text by each policy: as empty ones, then after every step.

    The random numbers depend on cfg.seed alone: all policies get the same.
    """
    device, eos_id = policies[0].gpt2.wte.weight.device, tokenizer.eos_token_id
    prompt, streams = torch.tensor([ids], device=device), []
    for policy in policies:
        generator = random_generator(device, cfg.seed)
        steps = policy.gpt2.stream(prompt, cfg.response_len, cfg.temperature, eos_id, generator)
        streams.append(itertools.takewhile(lambda new: new != eos_id, steps))
    written, nothing = [list(ids) for _ in policies], prompt[0, :0]
    for step in itertools.chain([[nothing] * len(policies)], itertools.zip_longest(*streams, fillvalue=nothing)):
        for text_ids, new in zip(written, step):
            text_ids += new.tolist()
        # all ids anew: a letter may begin in one token and end in the next
        decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        start, *texts = tokenizer.batch_decode([ids, *written], **decode)
        yield [text[len(start) :] for text in texts]


def judged(texts, reward_fn, judge):
    """[what stands under each text], [its colour]."""
    scores = as_scores(reward_fn(texts), texts)
    check_finite("score", scores, texts)
    probabilities = judge.log_odds(texts).sigmoid().tolist()
    told = [f"score {score:+.2f}, judge {p:.2f}" for score, p in zip(scores.tolist(), probabilities)]
    return told, [tint(p) for p in probabilities]


def answer(prompt, policies, tokenizer, reward_fn, judge, cfg):
    """Print what both policies answer to a prompt: while it grows, and judged when it is whole."""
    ids = prompt_ids(prompt, tokenizer, policies[0].gpt2.config, cfg)
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"  # a terminal whose cursor can go back
    column, painted = column_width(), 0
    room = shutil.get_terminal_size().lines - 1  # lines that scrolled out of sight cannot be painted over
    print(*columns(SIDES, column), sep="\n")
    for responses in growing_answers(ids, policies, tokenizer, cfg):
        if live:
            whole = [printable(text.rstrip("\ufffd")) for text in responses]  # U+FFFD: a letter's first bytes
            painted = repaint(columns(whole, column)[-room:], painted)
    told, codes = judged([prompt + text for text in responses], reward_fn, judge)
    lines = columns(map(printable, responses), column, codes) + columns(told, column, codes)
    print(rub_out(painted) + "\n".join(lines), end="\n\n", flush=True)


def repaint(lines, painted):
    """Print lines in place of the last so many on the terminal; returns how many there are now."""
    text = "".join(f"{line}\n" for line in lines)
    # ?7l to ?7h: no wrapping at the edge, where wide letters would make two lines of one
    print(f"{rub_out(painted)}\033[?7l{text}\033[?7h", end="", flush=True)
    return len(lines)


def rub_out(lines):
    """What moves a terminal's cursor up by some lines and clears them; nothing for none."""
    return f"\033[{lines}A\033[J" if lines else ""


def prompts(cfg):
    """Yield cfg.prompt alone, or else the lines of stdin up to an empty one, printed where nobody typed them here."""
    typed = not cfg.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        print("Type the beginning of a review; an empty line ends.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then knows the arrow keys and the lines before
    lines = [cfg.prompt] if cfg.prompt else iter(lambda: input("> " if typed else ""), "")
    try:
        for line in lines:
            if not typed:
                print(">", printable(line), flush=True)
            yield line
    except EOFError:
        if typed:
            print()


def main(cfg):
    check_finished(cfg.after)
    device, bf16 = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    if cfg.prompt:
        prompt_ids(cfg.prompt, tokenizer, config, cfg)  # refused before weights are read
    judge, reward_fn = load_judge(cfg, device), load_reward(cfg, device)
    policies = [load_policy(*parts, bf16).to(device).eval() for parts in opened.values()]
    print(f"Temperature {cfg.temperature}; under each answer its score and the judge's probability of POSITIVE.")
    for prompt in prompts(cfg):
        try:
            answer(prompt, policies, tokenizer, reward_fn, judge, cfg)
        except BadInput as error:
            if cfg.prompt:
                raise
            print_error(error)


if __name__ == "__main__":
    if sys.stdin:
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused, and the next one read
    run(main, GenerateConfig)
