"""What every image encoder returns, and what it offers."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float


class Features(NamedTuple):
    """Tokens of n images, as every image encoder returns them."""

    pooled: Float[Array, "n d"]  # joint space, not normalised
    levels: tuple[Float[Array, "n p _"], ...]  # patch tokens of each tapped level, no class token
    # what each tapped block reads, class token first; only where refinement is on
    inputs: tuple[Float[Array, "n s d"], ...] = ()


@runtime_checkable
class ImageEncoder(Protocol):
    """A hashable flax.linen module: `encoder.apply({"params": vision}, pixels) -> Features`.

    `method="project"` maps patch tokens of the last level into the joint space. A ViT also has the
    fields `heads` and `eps`, which refinement needs.
    """

    levels: tuple[int, ...]  # tapped blocks or stages, counted from 1
    dtype: str  # of the computation: float32 | bfloat16
    implementation: ClassVar[str]  # config.clip.implementation

    @property
    def inputs(self) -> bool:
        """Whether features hold what the tapped blocks read."""

    @property
    def depth(self) -> int:
        """Number of blocks or stages."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    def prepare(self, params: Any) -> Any:
        """A checkpoint's parameters -> the encoder's own, laid out as `apply` reads them."""

    def restore(self, vision: Any) -> Any:
        """The image part of a checkpoint's parameters; undoes `prepare`."""
