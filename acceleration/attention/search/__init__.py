"""Finding out what each head of a model needs: probe, curves, choice, and the plan file that comes of it."""

from .curves import Allocation, hull, within_cost, within_error
from .find import Limits, Problem, Tried, as_plan, cheapest_that_passes, pose
from .latency import LatencyTable, ideal, measure, of_attention
from .methods import BUDGETS, SEARCHES, SearchMethod
from .patterns import Pattern, candidates, head_selection
from .plan_file import ModelTag, PlanFile, from_steps, load_plan, save_plan, structure_hash
from .probe import LADDER, TRIED, Curves, Option, Probe, curves_from_json, curves_json

__all__ = [
    "BUDGETS",
    "LADDER",
    "SEARCHES",
    "TRIED",
    "Allocation",
    "Curves",
    "LatencyTable",
    "Limits",
    "ModelTag",
    "Option",
    "Pattern",
    "PlanFile",
    "Probe",
    "Problem",
    "SearchMethod",
    "Tried",
    "as_plan",
    "candidates",
    "cheapest_that_passes",
    "curves_from_json",
    "curves_json",
    "from_steps",
    "head_selection",
    "hull",
    "ideal",
    "load_plan",
    "measure",
    "of_attention",
    "pose",
    "save_plan",
    "structure_hash",
    "within_cost",
    "within_error",
]
