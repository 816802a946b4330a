"""A run with nested routing under two strategies: one set of numbers, and exact resume."""

from __future__ import annotations

from pathlib import Path

from rank_processes import rewound, run_ranks, run_strategies
from small_pipeline import assert_same_run, losses, metrics

STEPS, LAST_STATE, MIDDLE = 10, 4, [4, 4, 8]
STRATEGIES = {
    "fsdp": ["parallel.strategy=fsdp", "parallel.activation_checkpointing=0.5"],
    "zero2": ["parallel.strategy=deepspeed", "parallel.deepspeed.stage=2"],
}


def test_strategies_and_resumption_do_not_change_a_routed_run(small_pipeline):
    folder = small_pipeline.root / "routed"
    folder.mkdir()

    def config(out: Path) -> Path:
        model = {"size": "tiny", "latent_dim": 8, "num_base_tokens": 16, "num_classes": 17}
        return small_pipeline.generator_config(
            out,
            run_name="routed",
            model=model | {"routing": {"first": 1, "last": 1}},
            lengths={"choices": [8, 4, 16], "middle": MIDDLE},
            optimizer={"lr": 1e-3, "clip_norm": 0.5, "warmup": 3},
            checkpoint={"interval": "4ba", "keep": 5},
        )

    runs = run_strategies(config, folder, STRATEGIES)
    for name in STRATEGIES:
        assert_same_run(runs[name], runs["one"], STEPS, 1e-6)
    found = [next(key for key in row if "middle" in key) for row in metrics(runs["one"])]
    assert found == [f"loss/middle={MIDDLE[step % 3]}" for step in range(STEPS)]
    values = losses(runs["one"], STEPS)
    assert abs(values[0] - values[-1]) > 1e-3
    again = rewound(runs["one"], folder / "again", LAST_STATE)
    run_ranks(1, [(config(again), [])], folder / "again-log")
    assert losses(again, STEPS) == values
    assert_same_run(again, runs["one"], STEPS, 0)
