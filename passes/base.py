"""The pass contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

from torch.fx import GraphModule

Form: TypeAlias = Literal["aten", "score_op", "cut_op"]
"""How cuts are written.

* ``aten``: ATen operators alone, for graphs that other runtimes run.
* ``score_op``: the attention that tokens get is one operator with a kernel for it; the
  rest is ATen, which a compiler fuses into few launches. For a GPU.
* ``cut_op``: score and choice of a cut are one operator, with the layer's attention if
  that allows it, and so is each gather from the prompt. A compiler has little to plan,
  and nothing is launched. For a CPU.
"""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        module: The module that was handed in; passes edit it in place.
        modified: False means that the graph is as it was, to the last node.
    """

    module: GraphModule
    modified: bool


class Pass(ABC):
    """Edits a graph in place. Settings are fixed when a pass is made.

    A pass keeps placeholders and the number and order of outputs, gives every node that
    it inserts a ``val`` and a ``Stamp``, and keeps every recorded value true.

    Attributes:
        requires: Names of passes that must come before it in a pipeline.
        runs_after: Names of passes that must come before it where they are there.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    runs_after: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        """The pass's name in reports, errors, ``requires`` and ``runs_after``."""
        return type(self).__name__

    @final
    def __call__(self, module: GraphModule, *, recompile: bool = True) -> PassResult:
        """Run the pass and lint what it wrote.

        Args:
            module: Edited in place.
            recompile: Write the code of a changed module anew. A pipeline does so once,
                after its last pass.
        """
        modified = self.edit(module)
        if modified:
            module.graph.lint()
            if recompile:
                module.recompile()
        return PassResult(module, modified)

    @abstractmethod
    def edit(self, module: GraphModule) -> bool:
        """Change the graph; say whether anything was changed."""
