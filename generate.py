"""Complete the beginning of a review that you type, with the models before and after PPO side by side.

    python generate.py
    python generate.py --preset mini
    python generate.py --preset mini --prompt "The first half hour"    # complete this prompt and exit
    python generate.py --preset mini < prompts.txt                     # complete each line

An empty line or the end of the input (Ctrl-D, on Windows Ctrl-Z) ends the program. Below each response are its score
and the judge's probability of POSITIVE.
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import contextlib
import sys

import torch

from analysis.tables import JUDGED
from config import GenerateConfig
from data import decode, encode
from reward import check_finite, load_judge, load_reward, scored
from runtime.checkpoint import check_finished
from runtime.cli import run
from runtime.device import pick_device, random_generator
from runtime.distributed import refuse_processes
from runtime.errors import BadInput, print_error, printable
from runtime.hub import load_policy, open_pair
from runtime.log import TITLES, column_width, columns


def prompt_ids(prompt, tokenizer, config, cfg):
    """Return the ids of a prompt, a list. Raise BadInput if there are none, or too many to add a response."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # from bytes that are not UTF-8
        raise BadInput(f"prompt {prompt!a} is not UTF-8") from None
    ids = encode([prompt], tokenizer)[0]
    if not ids:
        raise BadInput(f"prompt {prompt!r} has no tokens")
    if len(ids) + cfg.response_len > config.n_positions:
        raise BadInput(
            f"the prompt has {len(ids)} tokens: with response_len {cfg.response_len} it exceeds the model's "
            f"{config.n_positions} positions"
        )
    return ids


def complete(ids, policies, tokenizer, cfg):
    """Return the response texts of the policies to the prompt `ids`, sampled with the same random numbers."""
    device, eos_id = policies[0].gpt2.wte.weight.device, tokenizer.eos_token_id
    prompt, texts = torch.tensor([ids], device=device), []
    for policy in policies:
        generator = random_generator(device, cfg.seed)
        sequences = policy.gpt2.generate(prompt, cfg.response_len, cfg.temperature, eos_id, generator)
        texts += decode(sequences, tokenizer)
    start = len(decode(prompt, tokenizer)[0])
    return [text[start:] for text in texts]


def respond(prompt, policies, tokenizer, reward_fn, judge, cfg):
    """Print the responses of both policies to a prompt, with their scores and the judge's probabilities."""
    ids = prompt_ids(prompt, tokenizer, policies[0].gpt2.config, cfg)
    responses = complete(ids, policies, tokenizer, cfg)
    texts = [prompt + response for response in responses]
    scores, _ = scored(reward_fn, texts)
    check_finite("score", scores, texts)
    probabilities, width = judge.log_odds(texts).sigmoid().tolist(), column_width()
    ratings = [f"score {score:+.2f}, judge {p:.2f}" for score, p in zip(scores.tolist(), probabilities)]
    rows = (TITLES, map(printable, responses), ratings)
    print("\n".join(line for row in rows for line in columns(row, width)), end="\n\n", flush=True)


def prompts(cfg):
    """Yield cfg.prompt or, if it is empty, the lines of stdin up to an empty one. Print prompts that are not typed."""
    typed = not cfg.prompt and sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        print("Type the beginning of a review; an empty line ends.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() the arrow keys and a history
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
    refuse_processes("generate.py")
    check_finished(cfg.after)
    device, dtype = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    if cfg.prompt:
        prompt_ids(cfg.prompt, tokenizer, config, cfg)  # check it before loading weights
    judge, reward_fn = load_judge(cfg, device, dtype), load_reward(cfg, device, dtype)
    policies = [load_policy(*parts, dtype).to(device).eval() for parts in opened.values()]
    print(f"Temperature {cfg.temperature}; below each response are its score and the judge's {JUDGED[cfg.task]}.")
    for prompt in prompts(cfg):
        try:
            respond(prompt, policies, tokenizer, reward_fn, judge, cfg)
        except BadInput as error:
            if cfg.prompt:
                raise
            print_error(error)


if __name__ == "__main__":
    if sys.stdin:
        # -sig: a file of Windows may start with a byte order mark; errors: prompt_ids refuses a line that is not UTF-8
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    run(main, GenerateConfig)
