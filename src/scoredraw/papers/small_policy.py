"""A small language model of arithmetic and letters, for trying rewards and advantages on.

Nine families of problems of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760; Apache-2.0),
asked in its words and answered after a `#`; sums are worked out first, a line a step:

    State the final answer to the following arithmetic problem: 4 - 1 + 12 =
    4-1=3
    3+12=15
    #15

The policy is a Llama-like transformer of 1.9 million weights (transformers' Granite, whose scales
are 1 here) with a token a character, trained on such texts (SFT) until it samples the right answer
for about half of new problems; there training from rewards begins. Its weights and 2,700 problems
ship in `data/small-policy`; `python -m scoredraw.papers.small_policy DIRECTORY` makes both again
(minutes on a GPU).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoredraw.errors import import_extra
from scoredraw.papers.sentence_embeddings import cache_directory
from scoredraw.papers.training import one_thread, rate
from scoredraw.rl.policy_training import open_policy

FOLDER = Path(__file__).parents[1] / "data" / "small-policy"
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {
        "min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1,
        "operators": ("+", "-"), "allow_parentheses": False,
    },
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 20},
    "count_bits": {"min_n": 1, "max_n": 4095},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "spell_backward": {"min_word_len": 3, "max_word_len": 7},
}  # fmt: skip
LETTERS = [chr(i) for i in range(32, 127)] + ["\n"]
LONGEST_PROMPT, LONGEST_ANSWER = 120, 48
TRAIN, TEST = 200, 100  # problems of each family
STEPS, BATCH, LEARNING_RATE = 6000, 256, 2e-3
LEVEL = 0.45  # sampled accuracy at which training stops

Problem = dict[str, str]


# ── problems ────────────────────────────────────────────────────────────────────────────────────


def problems(family: str, n: int, seed: int) -> list[Problem]:
    """n problems of a family: prompt, answer, family, and the text that SFT learns (target)."""
    gym = import_extra("reasoning_gym", "gym")
    made = gym.create_dataset(family, size=n, seed=seed, **FAMILIES[family])
    found = []
    for entry in made:
        prompt, answer = entry["question"].strip() + "\n", str(entry["answer"])
        if len(prompt) <= LONGEST_PROMPT and len(answer) < LONGEST_ANSWER:
            target = worked(entry) + "#" + answer
            found.append({"prompt": prompt, "answer": answer, "family": family, "target": target})
    return found


def worked(entry: dict[str, Any]) -> str:
    """The partial sums of a sum, a line each; nothing for other families.

    >>> worked({"metadata": {"expression": "4 - 1 + 12", "source_dataset": "chain_sum"}})
    '4-1=3\\n3+12=15\\n'
    """
    if entry["metadata"]["source_dataset"] not in {"chain_sum", "basic_arithmetic"}:
        return ""
    parts = re.findall(r"[+-]|\d+", entry["metadata"]["expression"])
    total, lines = int(parts[0]), ""
    for sign, term in zip(parts[1::2], parts[2::2], strict=True):
        new = total + int(term) * (1 if sign == "+" else -1)
        lines += f"{total}{sign}{term}={new}\n"
        total = new
    return lines


def said(completion: str) -> str:
    """What a completion answers: the text after its last `#`, "" without one."""
    return completion.rpartition("#")[2].strip() if "#" in completion else ""


def right_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion that ends in `#` and the answer, else 0; TRL calls it as a reward.

    >>> right_answer(["4-1=3\\n#3", "#4"], ["3", "3"])
    [1.0, 0.0]
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(said(text) == gold) for text, gold in zip(texts, answer, strict=True)]


def score_lines(
    prompts: Sequence[Any], steps: Sequence[Sequence[str]], **_: Any
) -> list[list[float | None]]:
    """A process reward of worked sums: 1 for a line that is true, -1 for one that is not.

    An answer after `#` is worth 1 if it is what the line before came to (or the first number, where
    nothing was worked out: no verdict). What is no sum has no score.

    >>> score_lines(["?"], [["4-1=3", "3+2=6", "#6"]])
    [[1.0, -1.0, 1.0]]
    """
    return [_true_lines(lines) for lines in steps]


def _true_lines(lines: Sequence[str]) -> list[float | None]:
    found: list[float | None] = []
    total: str | None = None
    for line in lines:
        sum_ = re.fullmatch(r"(-?\d+)([+-])(\d+)=(-?\d+)", line.strip())
        if sum_:
            a, sign, b, total = sum_.groups()
            value = int(a) + int(b) * (1 if sign == "+" else -1)
            found.append(1.0 if value == int(total) else -1.0)
        elif "#" in line and total is not None:
            found.append(1.0 if said(line) == total else -1.0)
        else:
            found.append(None)
    return found


def shipped_problems(part: str, families: Sequence[str] = tuple(FAMILIES)) -> list[Problem]:
    """The problems that ship: 200 of each family to "train" on, 100 to "test" with."""
    with gzip.open(FOLDER / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["family"] in families]


def split_problems(seed: int = 0, size: int = 20_000) -> dict[str, list[Problem]]:
    """Problems to learn from ("sft"), to reward ("train") and to measure by ("test"), none twice.

    size: drawn of each family before what was drawn twice is left out.
    """
    parts: dict[str, list[Problem]] = {"sft": [], "train": [], "test": []}
    for family in FAMILIES:
        different = {p["prompt"]: p for p in problems(family, size, seed)}
        rows = list(different.values())
        order = np.random.default_rng(seed).permutation(len(rows))
        ends = {"train": (0, TRAIN), "test": (TRAIN, TRAIN + TEST), "sft": (TRAIN + TEST, None)}
        for part, (first, last) in ends.items():
            parts[part] += [rows[i] for i in order[first:last]]
    return parts


def save_problems(directory: Path, parts: dict[str, list[Problem]]) -> None:
    """train.jsonl.gz and test.jsonl.gz, the same bytes each time."""
    for part in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in parts[part])
        packed = gzip.compress(text.encode(), mtime=0)
        (directory / f"{part}.jsonl.gz").write_bytes(packed)


# ── the policy ──────────────────────────────────────────────────────────────────────────────────


def new_tokenizer(letters: Sequence[str] = LETTERS) -> Any:
    """A token a character (printable ASCII and the line's end) or <unk>; padded on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_policy(tokenizer: Any, seed: int = 0) -> Any:
    """The transformer before any training: six layers of 160, 1.9 million weights.

    Not a Qwen2 or Llama by name: for those, AutoTokenizer insists on a tokenizer of their own.
    """
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(seed)
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=len(tokenizer), hidden_size=160, intermediate_size=448,
            num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=5,
            max_position_embeddings=256, tie_word_embeddings=True, attention_bias=True,
            attention_multiplier=32**-0.5,  # as usual: 160 / 5 numbers a head
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )  # fmt: skip


def small_policy() -> tuple[Any, Any]:
    """The trained policy that ships, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(FOLDER)


def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int = 0, batch: int = 300,
    **options: Any,
) -> list[str]:  # fmt: skip
    """One completion a prompt, sampled at temperature 1 unless options of `generate` say else."""
    device, texts = model.device, []
    torch.manual_seed(seed)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": LONGEST_ANSWER, **options}
    for start in range(0, len(prompts), batch):
        some = tokenizer(list(prompts[start : start + batch]), return_tensors="pt", padding=True)
        ids, seen = some["input_ids"].to(device), some["attention_mask"].to(device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=seen, **settings)
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


# ── SFT ─────────────────────────────────────────────────────────────────────────────────────────


def train(
    directory: Path, data: Sequence[Problem], held_out: Sequence[Problem], *,
    steps: int = STEPS, level: float = LEVEL, every: int = 200, device: str = "cpu", seed: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """SFT until held-out problems are answered right with probability `level`; saves float16.

    The learning rate falls as if all steps were made. -> what was measured every `every` steps.
    """
    tokenizer = new_tokenizer()
    net = new_policy(tokenizer, seed).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.05)
    history, start = [], time.monotonic()
    for step, (ids, labels) in enumerate(_batches(tokenizer, data, steps, seed, BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = rate(LEARNING_RATE, step, steps)
        kind = torch.device(device).type
        with torch.autocast(kind, torch.bfloat16):
            seen = ids != tokenizer.pad_token_id
            out = net(
                input_ids=ids.to(device), attention_mask=seen.to(device), labels=labels.to(device)
            )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            net.eval()
            texts = sample_answers(net, tokenizer, [p["prompt"] for p in held_out])
            net.train()
            right = right_answer(texts, [p["answer"] for p in held_out])
            row: dict[str, float] = {"step": step + 1, "loss": float(out.loss.detach())}
            row |= {"all": float(np.mean(right)), "seconds": time.monotonic() - start}
            for name in FAMILIES:
                own = [r for r, p in zip(right, held_out, strict=True) if p["family"] == name]
                row[name] = float(np.mean(own))
            history.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if row["all"] >= level:
                break
    net.to("cpu").half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return history


def fine_tuned(
    data: Sequence[Problem], *, source: str = str(FOLDER), steps: int = 300, batch: int = 64,
    learning_rate: float = 5e-4, seed: int = 0,
) -> Path:  # fmt: skip
    """The folder of a policy after SFT on further prompts and targets, in float32.

    source: of `open_policy`; the policy that ships where not given, for which half a second a step
    of 64 texts of 100 letters, on an idle core. Made once and kept in the cache: the same policy,
    data and settings find it there.
    """
    net, tokenizer = open_policy(source)
    weights = b"".join(weight.numpy().tobytes() for weight in net.state_dict().values())
    asked = json.dumps([list(data), steps, batch, learning_rate, seed]).encode()
    key = hashlib.blake2s(weights + asked, digest_size=8).hexdigest()
    folder = cache_directory() / f"policy-{key}"
    if not (folder / "config.json").is_file():
        optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
        net.train()
        with one_thread():
            for step, (ids, labels) in enumerate(_batches(tokenizer, data, steps, seed, batch)):
                optimizer.param_groups[0]["lr"] = rate(learning_rate, step, steps)
                seen = ids != tokenizer.pad_token_id
                optimizer.zero_grad()
                net(input_ids=ids, attention_mask=seen, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            net.save_pretrained(made)
            tokenizer.save_pretrained(made)
            with suppress(OSError):  # another process was faster, and made the same
                made.rename(folder)
    return folder


def _batches(
    tokenizer: Any, data: Sequence[Problem], steps: int, seed: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """ids (B, L) padded on the right, and labels: the target and the end, -100 elsewhere."""
    rng = np.random.default_rng(seed)
    prompts = tokenizer([p["prompt"] for p in data])["input_ids"]
    targets = tokenizer([p["target"] for p in data], add_special_tokens=False)["input_ids"]
    for _ in range(steps):
        rows = rng.integers(0, len(data), batch)
        texts = [prompts[i] + targets[i] + [tokenizer.eos_token_id] for i in rows]
        L = max(map(len, texts))
        ids = np.full((batch, L), tokenizer.pad_token_id)
        labels = np.full((batch, L), -100)
        for j, (i, text) in enumerate(zip(rows, texts, strict=True)):
            ids[j, : len(text)] = text
            labels[j, len(prompts[i]) : len(text)] = text[len(prompts[i]) :]
        yield torch.from_numpy(ids), torch.from_numpy(labels)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    made = split_problems()
    save_problems(target, made)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    train(target, made["sft"], made["test"], device=where)
