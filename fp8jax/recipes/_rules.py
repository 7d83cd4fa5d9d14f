"""Rules: which layers get which recipe, by their weight's key path and size."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, TypeAlias, get_args

from fp8jax.recipes._presets import bf16, check_recipe
from fp8jax.recipes._recipe import Recipe

GemmName: TypeAlias = Literal["fprop", "dgrad", "wgrad"]
GEMM_NAMES: tuple[GemmName, ...] = get_args(GemmName)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers whose weight's key path matches `pattern` get `recipe`.

    Attributes:
        pattern: regular expression that must match the whole path, `"a/b/c"`.
        recipe: of those layers; by default, and for None, `bf16()`, which leaves them
            as they are.
        reason: why, for the report; the pattern itself by default.
        roles: the GEMMs that the rule is about, all three by default; the others are
            for the rules after it.
        where: a predicate on the weight's `(k, n)`, its input and output features;
            None for weights of any size.

    Raises:
        ValueError: If `pattern` is no regular expression, `recipe` no recipe, `roles`
            no GEMMs or `where` no function.
    """

    pattern: str
    recipe: Recipe | None = None
    reason: str = ""
    roles: tuple[GemmName, ...] = GEMM_NAMES
    where: Callable[[int, int], bool] | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"Rule takes a regular expression as a string, got {self.pattern!r}."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Rule takes a regular expression, got {self.pattern!r}: {error}."
            ) from None
        if self.recipe is not None:
            check_recipe("Rule", self.recipe)
        roles = tuple(self.roles) if isinstance(self.roles, Collection) else ()
        if not roles or not all(role in GEMM_NAMES for role in roles):
            raise ValueError(f"Rule takes roles from {GEMM_NAMES}, got {self.roles!r}.")
        if self.where is not None and not _takes_two(self.where):
            raise ValueError(
                f"Rule takes where=None or a function of (k, n), got {self.where!r}."
            )
        object.__setattr__(self, "roles", roles)

    @property
    def gives(self) -> Recipe:
        """The recipe of its layers."""
        return bf16() if self.recipe is None else self.recipe

    def matches(self, path: str, role: GemmName, k: int, n: int) -> bool:
        """Whether the rule is about this GEMM of the weight at this path."""
        return (
            role in self.roles
            and re.fullmatch(self.pattern, path) is not None
            and (self.where is None or bool(self.where(k, n)))
        )


def _takes_two(predicate: Any) -> bool:
    try:
        inspect.signature(predicate).bind(1, 1)
    except ValueError:
        return True  # A builtin that does not tell.
    except TypeError:
        return False
    return True


def first_match(
    rules: Iterable[Rule], path: str, role: GemmName, k: int, n: int
) -> Rule | None:
    """The first rule about this GEMM of the weight [k, n] at this path, if any."""
    return next((rule for rule in rules if rule.matches(path, role, k, n)), None)


def _skip(names: str, reason: str) -> Rule:
    # A whole component of the path: `head` is one, `heads` another.
    return Rule(rf"(?i)(.*/)?({names})(/.*)?", None, reason)


# What DeepSeek-V3 keeps out of FP8 (arXiv:2412.19437, section 3.3.1), by the names
# that model code gives it.
DEFAULT_SKIPS: tuple[Rule, ...] = (
    _skip(
        r"embed|(\w*_)?embedder|embeddings?|embed_(in|tokens)|wte|wpe"
        r"|(\w*_)?(embed|emb|embedding|embeddings)(_\d+)?",
        "embedding",
    ),
    _skip(
        r"((lm|mlm|output|cls|classification|policy|value)_)?head|unembed(ding)?"
        r"|embed_out|output_layer|logits(_\w+)?|\w+_logits|classifier",
        "output head",
    ),
    # Llama's first name for it; deeper down, attention's `output` is another.
    Rule(r"(?i)(params/|model/)?output(/\w+)?", None, "output head"),
    _skip(r"\w*router(_\w+)?|gating", "router"),
    _skip(r"\w*norm(_?\w+)?|ln(_\w+|\d+)?|(\w+_)?ln", "norm"),
)


def skip_narrow(min_dim: int) -> Rule:
    """Skips weights of fewer input or output features than `min_dim`."""
    reason = f"a weight of fewer features than min_dim={min_dim}"
    return Rule(".*", None, reason, where=lambda k, n: min(k, n) < min_dim)
