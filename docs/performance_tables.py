"""Tables of asset/performance.json: the time of each phase of a PPO step, and other libraries on the same work."""

from analysis.tables import markdown

PHASES = {  # phases of analysis/bench.py, in the order of the rows
    "generate": "generate",
    "score": "score",
    "logprobs": "log-probabilities and values",
    "reference": "reference",
    "update": "update",
    "step": "whole step",
}


def performance_tables(data):
    """Return {"bench": Markdown, "peers": Markdown} for docs/performance.md. data: the object in performance.json."""
    bench = [["phase, ms", "124M", "of the peak", "mini", "of the peak"]]
    for name, label in PHASES.items():
        phases = data["bench"]["gpt2"][name], data["bench"]["mini"][name]
        bench.append([label, *(text for p in phases for text in (f"{p['ms']:,.0f}", f"{p['of_peak']:.2f}"))])
    peers = [["work", "library", "ours", "theirs", "times as fast", "memory, ours and theirs, GiB", "commit"]]
    for row in data["peers"]:
        seconds = (f"{row[name]:#.3g} s" for name in ("ours_s", "theirs_s"))
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        memory = f"{row['memory_ours']:.1f}, {row['memory_theirs']:.1f}"
        peers.append([row["work"], row["library"], *seconds, ratio, memory, row["commit"]])
    return {"bench": markdown(bench), "peers": markdown(peers)}
