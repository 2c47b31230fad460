"""One job with clocks around its stages: python -m bench.stages_worker OUT.json STARTED FLAG ...

STARTED: time.time() when the process was asked for; FLAG ...: those of medclip_jax.main. A stage's
seconds are its own: those of stages inside it, and of compilation (tracing, lowering, XLA or
reading its cache), are counted there. Only the main thread is timed: what threads read or write
beside it costs the job nothing.
"""

import functools
import json
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

COMPILE = {
    f"/jax/core/compile/{name}_duration"
    for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
}


class Clock:
    """Own seconds by stage, of the main thread."""

    def __init__(self, now=time.perf_counter):
        self.now, self.seconds = now, defaultdict(float)
        self.inside = [0.0]  # of each open stage: seconds counted elsewhere
        self.spans: list[tuple[float, float]] = []  # (begin, seconds) of compilations

    @contextmanager
    def stage(self, name: str):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        begin = self.now()
        self.inside.append(0.0)
        try:
            yield
        finally:
            whole = self.now() - begin
            self.seconds[name] += whole - self.inside.pop()
            self.inside[-1] += whole

    def compiled(self, event: str, duration: float, **_) -> None:
        """A listener of jax.monitoring; the parts of a compilation end before the whole of it."""
        if event not in COMPILE or threading.current_thread() is not threading.main_thread():
            return
        begin, own = self.now() - duration, duration
        while self.spans and self.spans[-1][0] >= begin:
            own -= self.spans.pop()[1]
        self.spans.append((begin, duration))
        self.seconds["compile"] += own
        self.inside[-1] += own

    def wrap(self, module, name: str, stage: str) -> None:
        """Count calls of module.name as the stage."""
        called = getattr(module, name)

        @functools.wraps(called)
        def timed(*args, **kwargs):
            with self.stage(stage):
                return called(*args, **kwargs)

        setattr(module, name, timed)

    def wrap_steps(self, module, name: str, stage: str) -> None:
        """Count each turn of the generator that module.name makes as the stage."""
        called = getattr(module, name)

        @functools.wraps(called)
        def timed(*args, **kwargs):
            made, end = iter(called(*args, **kwargs)), object()
            while True:
                with self.stage(stage):
                    item = next(made, end)
                if item is end:
                    return
                yield item

        setattr(module, name, timed)


def watch(clock: Clock) -> None:
    """Put the clock around the stages of a job."""
    import jax

    from medclip_jax import train
    from medclip_jax.clip import checkpoint
    from medclip_jax.data import datasets, preprocessing, records
    from medclip_jax.detectors import saved
    from medclip_jax.evaluation import evaluate
    from medclip_jax.explain import faithfulness
    from medclip_jax.features import encoder
    from medclip_jax.report import html
    from medclip_jax.training import loop

    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    clock.wrap_steps(records, "read_all", "read")
    for module, names, stage in (
        (checkpoint, ("load",), "load"),
        (datasets, ("load", "split"), "read"),
        (preprocessing, ("batch",), "preprocess"),
        (encoder, ("variants",), "synthesise"),
        (encoder, ("encode_share",), "encode"),
        (encoder, ("write", "load"), "feature_cache"),
        (loop, ("run",), "train"),
        (train, ("assemble", "quieter"), "score"),
        (evaluate, ("score_images",), "score"),
        (faithfulness, ("of_model",), "score"),
        (evaluate, ("measure", "write_predictions"), "metrics"),
        (saved, ("write",), "metrics"),
        (html, ("write",), "report"),
    ):
        for name in names:
            clock.wrap(module, name, stage)


def first_step(done: list[float]) -> None:
    """Append the time at which the first training step has ended."""
    import jax

    from medclip_jax.training import step

    make = step.make_step

    @functools.wraps(make)
    def made(*args, **kwargs):
        step = make(*args, **kwargs)

        def run(*given):
            result = step(*given)
            if not done:
                jax.block_until_ready(result)
                done.append(time.time())
            return result

        return run

    step.make_step = made


def main() -> int:
    out, started, *flags = sys.argv[1:]
    clock, done = Clock(), []
    clock.seconds["import"] = time.time() - float(started)  # Python's own start
    with clock.stage("import"):
        from medclip_jax import main as main_module

        watch(clock)
        first_step(done)
    code = main_module.main(["medclip-jax", *flags])
    if code:
        return code
    from bench import stages

    told = {name: clock.seconds[name] for name in stages.NAMES if name != "other"}
    step = done[0] - float(started) if done else None
    Path(out).write_text(json.dumps({"stages": told, "first_step": step}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
