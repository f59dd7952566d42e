"""What a run shows in the terminal: one live block, or plain lines where there is no terminal."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlhf_ray.config.run_names import RunNames
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.evaluation.verdict import names_in
from rlhf_ray.report.models import models_of_summary, other_tuned, over_sft
from rlhf_ray.runs.pace import Pace
from rlhf_ray.tables.figures import shown_figures

PLAIN_EVERY_S = 10.0  # between two lines at least, where there is no terminal
UNCHANGED_EVERY_S = 60.0  # where the second says nothing new


class Display:
    """Hears progress events of all stages. A context manager; `log` prints a line above the live block."""

    def __init__(self, console: Console | None = None, names: RunNames = RunNames()):
        """names: what the run calls its algorithm, its start and its reward."""
        self.names = names
        self.console = console or Console()
        self.live = (
            Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        )
        self._stage, self._event, self._started, self._samples = "", {}, time.monotonic(), []
        self._pace, self._doing = Pace(), ("", 0.0)  # what the stage does beside its steps, and since when
        self._last_plain, self._told, self._told_first = float("-inf"), (), 0.0  # when, and what it said since when

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, cursor and all."""
        if self.live is not None:
            self.live.stop()

    def log(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def __call__(self, event: dict) -> None:
        stage = event["stage"]
        if event.get("skipped"):
            return self.log(f"[dim]= {self._words(stage)}: done before[/]")
        if event.get("started"):
            self._stage, self._event, self._pace, self._doing = stage, {}, Pace(), ("", 0.0)
            self._started, self._samples = time.monotonic(), []
            if self.live is None:
                self.log(f"> {self._words(stage)}")
        elif event.get("done"):
            line = f"[green]+[/] {self._words(stage)}: {duration(event['seconds'])}"
            if event.get("seconds_before"):  # of a stage that went on where an earlier run stopped
                line += f" ({duration(event['seconds'] - event['seconds_before'])} of it now)"
            self._event, self._samples = {}, []
            self.log(line + (f"  [dim]{escape(event['summary'])}[/]" if event.get("summary") else ""))
        elif "goes_on_from" in event:
            self.log(f"  goes on from step {event['goes_on_from']}{escape(event.get('of', ''))}")
        elif "say" in event:
            self.log(f"  [yellow]{escape(event['say'])}[/]" if event.get("warns") else f"  {escape(event['say'])}")
        elif "published" in event:
            self.log(f"  step {event['step']} is version {event['published']} of the server")
        elif "samples" in event:
            self._samples = event["samples"]
        else:
            if "step" in event:
                self._pace.step(event["step"], time.monotonic(), event.get("elapsed_s"))
                event = {"waiting_for": None, "doing": None, **event}
            if event.get("doing") and event["doing"] != self._doing[0]:
                self._doing = event["doing"], time.monotonic()
            self._event |= event
        self._show()

    def _words(self, stage: str) -> str:
        """The stage's name; that of PPO's is the algorithm's own."""
        return self.names.told(STAGES[stage].words) if stage == "ppo" else STAGES[stage].words

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(Group(*self._block()))
        elif "step" in self._event:
            self._show_plain(time.monotonic())

    def _show_plain(self, now: float) -> None:
        """A line where there is something new, else one a minute that says what the stage waits for."""
        says = (self._stage, self._event["step"], self._event.get("doing"), *self._figures())
        is_new = says != self._told
        if now - self._last_plain <= (PLAIN_EVERY_S if is_new else UNCHANGED_EVERY_S):
            return
        line = "  " + self._line()
        if is_new:
            self._told, self._told_first = says, now
        elif waiting := self._waiting():
            line += f"   {waiting}"
        elif not self._event.get("doing"):  # that one has its time
            line += f"   nothing new for {duration(now - self._told_first)}"
        self._last_plain = now
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _waiting(self) -> str | None:
        """For what, and for how long, once it is a while."""
        what, seconds = self._event.get("waiting_for"), self._event.get("waiting_s", 0)
        return f"waiting {duration(seconds)} for {what}" if what and seconds >= 3 else None

    def _block(self) -> list:
        if not self._stage:
            return []
        head = Text.assemble((f"  {self._words(self._stage)}  ", "bold"), (self._line(), ""))
        block: list = [head]
        if waiting := self._waiting():
            block.append(Text(f"  {waiting}", "dim"))
        for sample in self._samples[:3]:
            block.append(
                Text.assemble(
                    ("  ", ""),
                    (one_line(sample["prompt"], 60), "dim"),
                    (" | ", "dim"),
                    (one_line(sample["response"], 90), ""),
                    (f"  {sample['score']:+.2f}", "cyan"),
                )
            )
        return block

    def _line(self) -> str:
        event, parts = self._event, []
        if event.get("doing"):
            parts.append(f"{event['doing']}, {duration(time.monotonic() - self._doing[1])}")
        elif "step" in event:
            total, about = event.get("total"), "about " if event.get("total_is_estimate") else ""
            parts.append(f"step {event['step']}" + (f" of {about}{total}" if total else ""))
            parts += self._rate(event["step"], total)
        parts += self._figures()
        return "   ".join(parts) or f"{duration(time.monotonic() - self._started)}"

    def _figures(self) -> list[str]:
        event, found = self._event, []
        metrics = event.get("metrics", {}) | {key: event[key] for key in ("loss",) if event.get(key) is not None}
        for key, name in (
            ("objective/score", "score"),
            ("objective/kl", "KL"),
            ("eval/score", "held-out score"),
            ("objective/response_length", "length"),
            ("loss", "loss"),
            ("accuracy", "accuracy"),
        ):
            if metrics.get(key) is not None:
                found.append(f"{name} {metrics[key]:.3g}")
        return found

    def _rate(self, step: int, total: int | None) -> list[str]:
        seconds = self._pace.seconds_per_step
        if seconds is None:
            return []
        rate = f"{seconds:.1f} s per step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.1f} steps per second"
        left = self._pace.left(total, time.monotonic(), self._event.get("limit_s")) if total and total > step else None
        return [rate] if left is None else [rate, f"{duration(left)} left"]


def duration(seconds: float) -> str:
    """75.3 -> '1 min 15 s'."""
    seconds = max(int(round(seconds)), 0)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"


def one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def summary_table(summary: dict) -> Table:
    """The closing table: SFT against PPO, and DPO where there is one, with 95 % intervals."""
    models, told = models_of_summary(summary), names_in(summary).told
    tuned = [over_sft(summary, model) for model in models if model != "sft"]
    between = "\n" if len(models) > 2 else " "  # three intervals side by side are wider than a terminal
    shown: Callable[[dict], str] = lambda figure: interval(figure, between=between)  # noqa: E731
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for model in models:
        table.add_column(told(model.upper()), justify="right")
    for each in shown_figures(summary["ppo"], summary.get("shown_as", {})):
        figures = [summary[model].get(each.name) for model in models]
        if each.short is not None and all(figures):
            table.add_row(told(each.short), *map(shown, figures))
    scorers = {"reward_model": told("reward model"), "judge": "judge"}
    for key, name in scorers.items():
        rates = [one["win_rate"].get(key) for one in tuned]
        if all(rates):
            table.add_row(f"win rate, {name}", "", *map(shown, rates), style="bold")
        level = [one["win_rate"].get("at_equal_length", {}).get(key) for one in tuned]
        if all(level):
            table.add_row("  at equal length", "", *map(shown, level))
    for other, (key, name) in itertools.product(other_tuned(summary), scorers.items()):
        rate = summary[f"ppo_over_{other}"]["win_rate"].get(key)
        if rate:
            table.add_row(f"over {other.upper()}, {name}", "", shown(rate), style="bold")
    kls = [one.get("kl") for one in tuned]
    if None not in kls:
        table.add_row("KL, nats per response", "", *(f"{kl:.2f}" for kl in kls))
    return table


def interval(figure: dict, digits: int = 3, between: str = " ") -> str:
    """ "0.8 [0.7, 0.9]"; of no width: the number alone."""
    if figure.get("mean") is None:
        return "-"
    if figure["high"] - figure["low"] <= 1e-9 * max(abs(figure["low"]), abs(figure["high"])):
        return f"{figure['mean']:.{digits}g}"
    number: Callable[[float], str] = lambda value: f"{value:.{digits}g}"  # noqa: E731
    return f"{number(figure['mean'])}{between}[{number(figure['low'])}, {number(figure['high'])}]"
