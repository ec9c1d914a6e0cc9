"""Attention that builds on earlier steps: modes of heads, when they change, and what is kept between them."""

from .announce import Announcement, Shape, announce, choose_policy
from .memory import AttentionMemory, Decision
from .modes import NAMES, Mode
from .schedule import ModeTable, ditfastattn, re_ttention, uniform, with_refreshes
from .storage import AS_COMPUTED, POLICIES, Policy

__all__ = [
    "AS_COMPUTED",
    "NAMES",
    "POLICIES",
    "Announcement",
    "AttentionMemory",
    "Decision",
    "Mode",
    "ModeTable",
    "Policy",
    "Shape",
    "announce",
    "choose_policy",
    "ditfastattn",
    "re_ttention",
    "uniform",
    "with_refreshes",
]
