"""What the driver tells the hub of a run: what it is, what it is doing, and what became of its time."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator import __version__
from orchestrator.config import RunConfig
from orchestrator.launching.failures import lost_mark
from orchestrator.launching.hub import HubClient, HubSettings
from orchestrator.planning.plan import Plan
from orchestrator.storage.folder import RunFolder
from orchestrator.telemetry.accounting import Account
from orchestrator.telemetry.meter import Meter
from orchestrator.telemetry.observing import observe_account, observe_run, observe_state
from orchestrator.telemetry.publisher import Publisher
from orchestrator.telemetry.records import Follower

__all__ = ["Teller"]


class Teller:
    """Follows a run's records and publishes what only the driver can say of it; silent where telemetry is off."""

    def __init__(self, folder: RunFolder, config: RunConfig, plan: Plan, *, embedded: bool) -> None:
        self._folder = folder
        self._attempts, self._metrics = Follower(folder.attempts), Follower(folder.metrics)
        self._account = Account()
        self._state = "starting"
        self._embedded = embedded
        self._told = False
        self._client = HubClient(HubSettings.of(config.telemetry))
        self._publisher: Publisher | None = None
        lost_mark(folder).unlink(missing_ok=True)
        self._fold()
        if config.telemetry.enabled:
            attempt = self._account.attempts + 1
            self._publisher = Publisher(
                self._client, run=config.name, source="driver", attempt=attempt, sample=self._sample
            )
            self._publisher.note(observe_run, _info(config, plan))

    def look(self) -> None:
        """Take in what has been recorded since the last look; with telemetry off, too: it clears the mark of a loss."""
        known = self._account.attempts
        stepped = self._fold()
        if lost_mark(self._folder).exists() and self._account.attempts == known:
            self._state = "restarting"
        elif self._account.attempts > known:
            lost_mark(self._folder).unlink(missing_ok=True)
            self._state = "starting"
        if stepped and self._state != "restarting":
            self._state = "running"

    def stands(self, state: str) -> None:
        """Say what the run does between two attempts: "waiting" for its fleet, or "starting"."""
        self._fold()  # steps of the attempt before are no sign of the next
        self._state = state

    def address(self) -> str | None:
        """Host and port where the run's metrics are served; said once, when it is known."""
        if self._told or self._client.address is None:
            return None
        self._told = True
        return self._client.address

    def end(self, state: str) -> None:
        """Say how the run ended: "finished", "stopped" or "failed"."""
        self._fold()
        self._attempts.close()
        self._metrics.close()
        if self._publisher is None:
            return
        self._state = state
        self._publisher.close()
        if self._embedded:
            self._client.leave()

    def _fold(self) -> bool:
        """Bring the account up to date; says whether steps were taken."""
        steps = self._metrics.poll()  # first, so that no step comes before the start of its attempt
        events = sorted([*steps, *self._attempts.poll()], key=lambda record: record["time"])
        for record in events:
            after = self._account.after_attempt if "event" in record else self._account.after_step
            self._account = after(record)
        return bool(steps)

    def _sample(self, meter: Meter) -> None:
        observe_account(meter, self._account)
        observe_state(meter, self._state)


def _info(config: RunConfig, plan: Plan) -> Mapping[str, str]:
    return {
        "device": plan.device,
        "policy": config.policy.name,
        "precision": plan.precision,
        "version": __version__,
        "zero_stage": str(plan.zero_stage),
    }
