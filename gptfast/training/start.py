"""The choice between a new run and one that is resumed, in all processes of a run."""

from __future__ import annotations

from gptfast._options import values_of
from gptfast.training.launch import Options, new_run, resumed_run
from gptfast.training.options import RunOptions
from gptfast.training.ranks import Ranks
from gptfast.training.run import Run
from gptfast.training.run_folder import check_room


def start_run(options: Options, ranks: Ranks | None = None, again: bool = False) -> Run:
    """The run that the options ask for, new or resumed.

    Args:
        options: those that were given.
        ranks: the processes of the run; None: this one alone.
        again: the run was started before with these options: it is continued where it has a checkpoint.
    Raises:
        Whatever `new_run` and `resumed_run` raise.  RankLostError: rank 0 failed.
    """
    out, wish = RunOptions(**values_of(RunOptions, options)).out, options.get("resume")
    by_itself = wish == "auto" or again
    resumes = bool(check_room(out, overwrite=True)) if by_itself else bool(wish)

    def run() -> Run:
        return resumed_run(options, ranks, finished_too=by_itself) if resumes else new_run(options, ranks)

    if ranks is None:
        return run()
    return ranks.main_first(run, "the start", run)  # the others find the data that rank 0 has prepared
