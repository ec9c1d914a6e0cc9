"""What a block is made of, as far as its parts can be cached one by one."""

from dataclasses import dataclass

ATTN, CROSS_ATTN, MLP = "attn", "cross_attn", "mlp"
#: Every name that a table may use, in the order in which a block runs them.
MODULE_NAMES = (ATTN, CROSS_ATTN, MLP)


@dataclass(frozen=True)
class Layout:
    """One cacheable module of a kind of block.

    What a module yields before gate and residual comes out of its ``outputs``. An attention over several streams is no
    module of its own in most families: projections into it, the attention function, projections out of it. Then the
    ``inner`` parts feed nothing but the outputs, and need not run, like the attention between them, where the outputs
    are put in.

    Attributes:
        names: columns of a table that speak for it. Of several names (attention and MLP in parallel, summed by one
            projection) it runs where any is computed.
        outputs: paths, from the block, of the parts whose outputs are kept and put in; absent ones are left out.
        inner: paths of parts that run before them, in vain where the outputs are put in.
    """

    names: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModuleSite:
    """One cacheable module of a network; see :class:`Layout`.

    Attributes:
        depth: block it belongs to, in execution order.
        names: columns of a table that speak for it.
        outputs: paths from the network.
        inner: paths from the network.
    """

    depth: int
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its parts."""
        return self.inner + self.outputs

    @property
    def parts(self) -> "tuple[ModulePart, ...]":
        """All its parts."""
        return tuple(ModulePart(self, path, path in self.inner) for path in self.paths)


@dataclass(frozen=True)
class ModulePart:
    """One part of a module, which a host can stand around.

    Attributes:
        site: the module.
        path: path of the part from the network.
        inner: whether it is one of the site's inner parts, not one of its outputs.
    """

    site: ModuleSite
    path: str
    inner: bool = False


@dataclass(frozen=True)
class TextPart:
    """One part of a chain of parts that turn text, and nothing else, into keys or values.

    Attributes:
        path: path of the part from the network.
        chain: path of the chain's last part, which names it.
        first: whether it is given the text.
        last: whether the chain ends with it.
    """

    path: str
    chain: str
    first: bool = True
    last: bool = True


def present(block: object, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the dotted ``paths`` that lead to something in ``block``."""
    return tuple(path for path in paths if _reach(block, path) is not None)


def _reach(block: object, path: str) -> object | None:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


#: FLUX's blocks, which HunyuanVideo and Chroma share.
FLUX_DOUBLE = (
    Layout((ATTN,), ("img_attn.proj", "txt_attn.proj"), ("img_attn.qkv", "txt_attn.qkv")),
    Layout((MLP,), ("img_mlp", "txt_mlp")),
)
FLUX_SINGLE = (Layout((ATTN, MLP), ("linear2",), ("linear1", "mlp_act")),)
FLUX_MODULATIONS = (("double_blocks", ("img_mod", "txt_mod")), ("single_blocks", ("modulation",)))
