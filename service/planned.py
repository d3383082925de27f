"""A dry run's answer, as the command line prints it."""

from collections.abc import Iterator, Mapping
from typing import Any

GIB, MIB = 2**30, 2**20
Plan = Mapping[str, Any]


def lines(plan: Plan) -> Iterator[str]:
    """The sets, the steps, the memory and the place in the line; then what warns."""
    for name, one in plan["sets"].items():
        yield f"{name}: {one['rows']:,} rows, {one['bytes']:,} bytes; {_tokens(one)}"
    yield _steps(plan["steps"])
    yield _evaluation(plan["evaluation"])
    yield from _memory(plan["memory"])
    yield f"jobs ahead: {plan['jobs_ahead']}" + (f"; {plan['status_reason']}" if plan["status_reason"] else "")
    for warning in plan["warnings"]:
        yield f"warning: {warning['message']}"


def _tokens(one: Plan) -> str:
    told = one["tokens"]
    if told is None:
        return f"tokens unknown: {one['tokens_reason']}"
    about = "" if told["exact"] else "about "
    said = f"{about}{told['total']:,} tokens, {told['counted']:,} of them counted, longest row {told['longest']:,}"
    return said if told["exact"] else f"{said} ({told['reason']})"


def _steps(steps: Plan) -> str:
    said = (
        f"steps: at most {steps['max_steps']:,}, each of {steps['forget_rows']} forget and {steps['retain_rows']} "
        f"retain rows; {steps['forget_passes']:.3g} passes over the forget set"
    )
    if steps["tokens_per_step"] is None:
        return said
    return f"{said}; {steps['tokens_per_step']:,} tokens per step, {steps['tokens_max']:,} in all"


def _evaluation(evaluation: Plan) -> str:
    attacks = f"attacks: {', '.join(evaluation['attacks']) or 'none'}"
    if evaluation["answers"] is None:
        return f"evaluation after training: {attacks}"
    generated = f"{evaluation['answers']:,} answers, at most {evaluation['tokens_max']:,} tokens in all"
    return f"evaluation after training: {generated}; {attacks}"


def _memory(memory: Plan) -> Iterator[str]:
    if memory["reason"]:
        yield f"memory unknown: {memory['reason']}"
        return
    for name, where in (("cpu_float32", "a CPU, float32"), ("accelerator_bfloat16", "an accelerator, bfloat16")):
        one = memory[name]
        parts = ", ".join(
            f"{part} {_bytes(one[part])}"
            for part in ("weights", "adapter", "reference", "activations", "head", "rounded")
        )
        yield f"memory on {where}: about {_bytes(one['total'])} when {one['phase'].replace('_', ' ')} ({parts})"


def _bytes(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
