"""The published sparse attention methods as rows of one table: each file says what its method contributes."""

from .arrow import ARROW
from .block_mass import BLOCK_MASS
from .clear import CLEAR
from .draft import DRAFT
from .grat import GRAT_B, GRAT_X
from .method import AttentionMethod
from .radial import RADIAL
from .salad import SALAD
from .sla import SLA
from .sliding_tiles import SLIDING_TILES
from .sol import SOL
from .subblock import SUBBLOCK
from .top_k import TOP_K
from .vdit import DIAGONAL, MULTI_DIAGONAL, SPARSE_VDIT, STRIPES

__all__ = ["DEFAULT", "METHODS", "AttentionMethod"]

METHODS: dict[str, AttentionMethod] = {
    method.name: method
    for method in (
        BLOCK_MASS,
        TOP_K,
        SUBBLOCK,
        SOL,
        DRAFT,
        SLA,
        SALAD,
        RADIAL,
        SLIDING_TILES,
        GRAT_B,
        GRAT_X,
        CLEAR,
        ARROW,
        SPARSE_VDIT,
        DIAGONAL,
        MULTI_DIAGONAL,
        STRIPES,
    )
}
#: For users who know no method by name: nothing to train or calibrate, and the least error at 25 to 50 %.
DEFAULT = BLOCK_MASS.name
