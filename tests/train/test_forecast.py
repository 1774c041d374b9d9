"""The forecast of time and memory: its parts, what makes it grow, and that it comes true."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, MixtralConfig

from tests.tiny import embedded_model
from tunefork.recipe import make_recipe
from tunefork.train import speed
from tunefork.train.forecast import Forecast, forecast
from tunefork.train.heap import Heap
from tunefork.train.memory import PeakMeter, anonymous_bytes
from tunefork.train.prepare import prepare
from tunefork.train.simulation import Simulation
from tunefork.zo.options import presets

Tiny = Callable[[str], Path]
GIB = 2**30
LEAKY = {"layout": "prompt_completion", "max_leaked": 1.0}


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[int], str]:
    """Words a row -> file of 24 labelled rows of that length."""

    def make(words: int) -> str:
        path = tmp_path / f"{words}.csv"
        texts = [" ".join(f"word{(i * 7 + j) % 50}" for j in range(words)) for i in range(24)]
        lines = [f"{text} {i},{'good' if i % 2 else 'bad'}" for i, text in enumerate(texts)]
        path.write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
        return str(path)

    return make


def look_ahead(
    model: str | Path,
    train: str,
    *,
    adapter: str = "none",
    task: Any = "classification",
    data: dict[str, Any] | None = None,
    preset: str = "default",
    zo: dict[str, Any] | None = None,
    **options: Any,
) -> Forecast:
    section = {"max_steps": 3, "evaluate_every": 3, "batch_size": 4, "micro_batch_size": 4, **options}
    recipe = {"model": str(model), "task": task, "data": {"train": train, **(data or {})}, "adapter": adapter}
    recipe |= {"train": section, "zo": {"preset": preset, **(zo or {})} if section.get("method") == "zo" else {}}
    return forecast(prepare(make_recipe(recipe)))


def write_config(config: Any, folder: Path) -> Path:
    """A model folder whose weights are as good as absent."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}, folder / "model.safetensors")
    return folder


def test_parts_sum_to_the_peak_and_the_peak_is_the_highest_phase(tiny: Tiny, rows: Callable[[int], str]) -> None:
    for adapter in ("none", "lora"):
        found = look_ahead(tiny("llama"), rows(10), adapter=adapter)
        assert sum(found.parts.values()) == found.memory_bytes == max(found.phases.values())
        assert all(size > 0 for size in found.parts.values())
        assert set(found.phases) == {"load", "step", "look", "save"}
        assert found.seconds is not None and found.step_seconds is not None and 0 < found.step_seconds < found.seconds


def test_more_rows_and_longer_rows_need_more(tiny: Tiny, rows: Callable[[int], str]) -> None:
    base = look_ahead(tiny("qwen"), rows(10))
    wider = look_ahead(tiny("qwen"), rows(10), batch_size=16, micro_batch_size=16)
    longer = look_ahead(tiny("qwen"), rows(40))
    assert wider.phases["step"] > base.phases["step"]
    assert longer.phases["step"] > base.phases["step"]


def test_micro_batches_save_memory(tiny: Tiny, rows: Callable[[int], str]) -> None:
    whole = look_ahead(tiny("llama"), rows(40), batch_size=16, micro_batch_size=16)
    cut = look_ahead(tiny("llama"), rows(40), batch_size=16, micro_batch_size=4)
    assert cut.phases["step"] < whole.phases["step"]


def test_a_larger_model_needs_more(tmp_path: Path, rows: Callable[[int], str]) -> None:
    sizes = []
    for hidden in (64, 128):
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=8192,
        )
        sizes.append(look_ahead(write_config(config, tmp_path / str(hidden)), rows(10)))
    assert sizes[1].memory_bytes > sizes[0].memory_bytes
    assert sizes[1].parts["weights"] == pytest.approx(2 * sizes[0].parts["weights"], rel=0.2)


def test_checkpointing_lowers_the_activations(tmp_path: Path, rows: Callable[[int], str]) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, vocab_size=8192
    )
    folder = write_config(config, tmp_path / "deep")
    kept = look_ahead(folder, rows(100), activation_checkpointing=False)
    recomputed = look_ahead(folder, rows(100), activation_checkpointing=True)
    assert recomputed.phases["step"] < 0.7 * kept.phases["step"]


def test_an_adapter_lowers_the_optimizer_state(rows: Callable[[int], str]) -> None:
    full, lora = (
        look_ahead("embedded", rows(10), adapter=a, batch_size=16, micro_batch_size=16) for a in ("none", "lora")
    )
    parameters = full.parts["weights"] // 4
    assert full.parts["optimizer state"] == pytest.approx(8 * parameters, rel=0.01)
    assert lora.parts["optimizer state"] < 0.2 * full.parts["optimizer state"]


def test_four_bits_take_an_eighth_of_fp32(tmp_path: Path, rows: Callable[[int], str]) -> None:
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, vocab_size=8192
    )
    folder = write_config(config, tmp_path / "wide")
    lora, qlora = (look_ahead(folder, rows(10), adapter=a) for a in ("lora", "qlora"))
    inside = 4 * 4 * (4 * 512 * 512 + 3 * 512 * 2048)  # bytes of the blocks' matrices in fp32
    assert lora.parts["weights"] - qlora.parts["weights"] == pytest.approx(inside * (1 - 4.5 / 32), rel=0.05)


def test_frozen_weights_in_the_format_of_the_file_stay_there(tiny: Tiny, rows: Callable[[int], str]) -> None:
    full, lora = (look_ahead(tiny("llama"), rows(10), adapter=a) for a in ("none", "lora"))
    assert full.mapped_bytes == 0
    assert lora.mapped_bytes > 100_000


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma"])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_other_decoders_are_simulated(tiny: Tiny, rows: Callable[[int], str], kind: str, adapter: str) -> None:
    assert look_ahead(tiny(kind), rows(10), adapter=adapter).seconds is not None


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("adapter", ["none", "head", "dora"])
def test_encoders_are_simulated(tiny: Tiny, rows: Callable[[int], str], kind: str, adapter: str) -> None:
    task = {"name": "classification", "form": "head"}
    assert look_ahead(tiny(kind), rows(10), adapter=adapter, task=task).seconds is not None


@pytest.mark.parametrize("preset", sorted(presets()))
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_steps_without_gradients_are_simulated(
    tiny: Tiny, rows: Callable[[int], str], preset: str, adapter: str
) -> None:
    zo = look_ahead(tiny("llama"), rows(10), adapter=adapter, method="zo", preset=preset)
    assert zo.step_seconds is not None
    other = look_ahead(tiny("llama"), rows(10), adapter=adapter)
    assert zo.phases["step"] - zo.parts["start-up"] < other.phases["step"] - other.parts["start-up"]
    assert zo.mapped_bytes > 100_000 if adapter == "lora" or preset == "default" else zo.mapped_bytes == 0


def test_more_queries_take_more_time_and_micro_batches_as_much(tiny: Tiny, rows: Callable[[int], str]) -> None:
    def seconds(queries: int, micro: int) -> float:
        zo = {"queries": queries, "estimator": "two_sided", "normaliser": "none"}
        options = {"max_steps": 1000, "micro_batch_size": micro, "evaluate_every": 1000}
        found = look_ahead(tiny("gpt2"), rows(60), method="zo", preset="fzoo", zo=zo, **options)
        assert found.step_seconds is not None
        return found.step_seconds

    one, six, halves = seconds(1, 4), seconds(6, 4), seconds(6, 2)
    assert six == pytest.approx(6 * one, rel=0.4)
    assert halves == pytest.approx(six, rel=0.4)


def test_a_head_fitted_to_many_rows_first_is_part_of_the_peak(tiny: Tiny, rows: Callable[[int], str]) -> None:
    task = {"name": "classification", "form": "head"}
    found = look_ahead(tiny("bert"), rows(40), adapter="head", task=task, method="zo", head_start="probe")
    assert found.phases["load"] < found.phases["start"] < 3 * found.phases["look"]


def test_looks_at_text_are_no_larger_for_a_large_vocabulary(tmp_path: Path, rows: Callable[[int], str]) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=2**17
    )
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"prompt": "word " * 20, "completion": f" answer {i}" * 20}) for i in range(60)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    task = {"name": "generation", "metric": "loss"}
    found = look_ahead(write_config(config, tmp_path / "wide"), str(texts), adapter="lora", task=task, data=LEAKY)
    longest = 4 * 2**17 * 128  # one row's logits, in bytes
    assert found.phases["look"] < found.phases["load"] + 2 * longest


def test_what_cannot_be_simulated_is_said_to_be_coarse(tmp_path: Path, rows: Callable[[int], str]) -> None:
    eager: dict[str, Any] = {"experts_implementation": "eager"}
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=8192, num_local_experts=4, **eager,
    )  # fmt: skip
    found = look_ahead(write_config(config, tmp_path / "experts"), rows(10))
    if found.seconds is None:
        assert "Coarse" in found.how
    assert found.memory_bytes == sum(found.parts.values()) > 16 * 64 * 8192


def test_a_forecast_changes_nothing(tiny: Tiny, rows: Callable[[int], str]) -> None:
    look_ahead(tiny("llama"), rows(10), adapter="lora")
    before = torch.random.get_rng_state()
    first = look_ahead(tiny("llama"), rows(10), adapter="lora")
    assert torch.equal(before, torch.random.get_rng_state())
    assert look_ahead(tiny("llama"), rows(10), adapter="lora").memory_bytes == first.memory_bytes


@pytest.mark.slow
def test_seventy_billion_parameters_are_forecast_without_being_loaded(
    tmp_path: Path, rows: Callable[[int], str]
) -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    before = anonymous_bytes()
    found = look_ahead(
        write_config(config, tmp_path / "large"), rows(10), adapter="lora", activation_checkpointing=True
    )
    after = anonymous_bytes()
    assert found.parts["weights"] == pytest.approx(4 * 70.6e9, rel=0.02)  # fp32, as a CPU computes by default
    assert before is not None and after is not None and after - before < 2 * GIB


def run_and_compare(recipe: dict[str, Any], tmp_path: Path) -> tuple[int, int]:
    """(forecast, measured) peak bytes of a run in a process of its own."""
    code = (
        "import json, sys, torch; torch.set_num_threads(2)\n"
        "from tunefork.recipe import make_recipe\nfrom tunefork.workflows import finetune\n"
        "print(json.dumps(finetune(make_recipe(json.loads(sys.argv[1]))).result['peak_memory_bytes']))"
    )
    section = {"max_steps": 4, "evaluate_every": 4, "save_every": 4, **recipe["train"]}
    tree = {**recipe, "train": section, "evaluate": {"baselines": []}, "out": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(tree)],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    peak = json.loads(done.stdout.splitlines()[-1])
    return peak["forecast"], peak["value"]


@pytest.mark.slow
@pytest.mark.skipif(anonymous_bytes() is None, reason="this system does not tell a process's anonymous memory")
@pytest.mark.parametrize(("adapter", "words"), [("none", 30), ("lora", 60)])
def test_the_forecast_comes_true(adapter: str, words: int, rows: Callable[[int], str], tmp_path: Path) -> None:
    recipe = {
        "model": "embedded", "task": "classification", "data": {"train": rows(words)}, "adapter": adapter,
        "train": {"batch_size": 16, "micro_batch_size": 16},
    }  # fmt: skip
    expected, measured = run_and_compare(recipe, tmp_path)
    assert expected == pytest.approx(measured, rel=0.25)


@pytest.mark.skipif(anonymous_bytes() is None, reason="this system does not tell a process's anonymous memory")
def test_a_later_run_of_a_process_is_charged_for_memory_that_an_earlier_one_freed() -> None:
    def used() -> int | None:
        with PeakMeter(torch.device("cpu")) as memory:
            blocks = [torch.ones(16 * 1024) for _ in range(1500)]  # 64 KiB each: the C library's heap keeps them
            pins.append(blocks[-1])  # above what is freed
            del blocks
        return memory.value

    pins: list[torch.Tensor] = []
    first, second = used(), used()
    assert first is not None
    assert second is not None
    assert second > 80 * 2**20


@given(st.lists(st.integers(1, 2**24), min_size=1, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_heap_holds_what_is_alive_and_reuses_what_is_not(sizes: list[int], random: Any) -> None:
    heap, live, peak = Heap(), {}, 0
    for i, size in enumerate(sizes):
        live[i] = size, heap.allocate(size)
        places = sorted(block for _, block in live.values() if block[0] >= 0)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(places))
        assert heap.resident >= sum(size for size, _ in live.values())
        peak = max(peak, heap.resident)
        if random.random() < 0.4:
            heap.release(live.pop(random.choice(list(live)))[1])
    for _, block in live.values():
        heap.release(block)
    assert heap.resident <= peak
    held = heap.resident
    heap.release(heap.allocate(1))
    assert heap.resident <= max(held, 2**18)  # a small block fits where everything is free


def test_a_simulation_counts_true_tensors_as_the_process_does() -> None:
    simulation = Simulation(torch.device("cuda"))  # bytes alone, without the heap of a CPU
    with simulation, simulation.phase("all"):
        a = torch.ones(1000)
        b = a.view(10, 100)[3:]
        c = b * 2
        del a, b
        d = c + 1
    assert simulation.phases["all"].total == 4000 + 2800  # a and c; a is freed before d is made
    del c, d


def test_a_recording_names_what_is_made_and_what_is_freed() -> None:
    simulation = Simulation(torch.device("cpu"))
    with simulation, simulation.recorded() as events:
        a = torch.ones(10)
        b = a * 2
        del a
        c = b.view(2, 5) + 1
        del b, c
    assert events == [40, 40, ~0, 40, ~1, ~3]


def test_steps_of_many_sizes_take_more_than_two() -> None:
    """The holes of one shape do not fit the next."""
    blocks = [torch.nn.Sequential(torch.nn.Linear(96, 384), torch.nn.GELU(), torch.nn.Linear(384, 96)) for _ in "1234"]
    model = torch.nn.Sequential(*blocks)

    def step(rows: int) -> None:
        model(torch.ones(rows, 96)).sum().backward()
        model.zero_grad()

    def held(shares: list[float]) -> int:
        simulation = Simulation(torch.device("cpu"))
        with simulation:
            with simulation.recorded() as light:
                step(100)
            with simulation.recorded() as heavy:
                step(400)
            simulation.replay(light, heavy, shares)
            with simulation.phase("rest"):
                pass
        assert simulation.phases["rest"].parts[""] == 0
        return simulation.phases["rest"].total

    two, many = held([]), held([(7 * i % 50) / 50 for i in range(50)])
    assert two < many < 2 * two


def test_work_is_counted() -> None:
    simulation = Simulation(torch.device("cpu"))
    x, w = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    with simulation:
        (x @ w).sum().backward()
    assert simulation.work.matmuls == {(torch.float32, 1, 3, 4, 5): 1, (torch.float32, 1, 4, 3, 5): 1}
    assert simulation.work.operations >= 3
    cost = speed.cost(simulation.work, torch.device("cpu"))
    assert 0 < cost.seconds < cost.scaled(1e6).seconds
