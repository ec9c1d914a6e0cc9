"""Fitting forecast weights through ComfyUI: a sampling job run by samplers that look at what happens."""

from collections.abc import Callable

from ..caching.fit_search import FitPrediction, balanced_decibels
from ..caching.fitting import FittedWeights, FittingSampler, PlainSampler
from ..caching.masks import Mask
from .comfy_sampling import Callback, SamplingJob

#: How far the solver's slope may be from the network's output for weights of one to be weights of the other.
_SAME = 1e-6


class EulerFitter:
    """Fits weights to a sampling job's model, prompt and seed (:class:`~..caching.search.Fitter`).

    Args:
        job: a job for which :meth:`suits` holds.
        progress: returns a step callback for each run.
    """

    def __init__(self, job: SamplingJob, progress: Callable[[], Callback]) -> None:
        self.job, self.progress, self.plain = job, progress, PlainSampler()
        self.fitted: dict[Mask, FittedWeights] = {}
        self.runs = 0

    @staticmethod
    def suits(job: SamplingJob) -> bool:
        """Whether weights can be fitted: Euler's method on a network whose output is its slope."""
        return job.sampler_name == "euler" and job.slope_is_output(_SAME)

    def prediction(self) -> FitPrediction:
        """Return what a plain run and a few fitted ones predict of every mask."""
        prediction = FitPrediction.of(self._states(), self.job.sigmas().tolist())
        return prediction.suited(self._quality)

    def fit(self, mask: Mask) -> FittedWeights:
        """Return the weights of a mask, from one run."""
        if mask not in self.fitted:
            self._quality(mask)
        return self.fitted[mask]

    def _quality(self, mask: Mask) -> float:
        """Fit a mask; return how near its run ends to the plain one, in dB."""
        sampler, ends = FittingSampler(mask, self._states()), []
        self.runs += 1
        self.job.run_with(lambda *args, **kwargs: ends.append(sampler(*args, **kwargs)) or ends[0], self.progress())
        self.fitted[mask] = FittedWeights(mask, sampler.weights, tuple(self.job.sigmas().tolist()))
        return balanced_decibels((ends[0] - self.plain.states[-1]).float().square().flatten(1).mean(1).tolist())

    def _states(self) -> list:
        if not self.plain.states:
            self.runs += 1
            self.job.run_with(self.plain, self.progress())
        return self.plain.states
