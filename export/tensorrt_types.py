"""What is used of TensorRT's objects: the library ships no types.

Each class describes the object of the same name, or a part of it, in TensorRT's Python
interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Shape = tuple[int, ...]


class Log(Protocol):
    """The process's logger; ``errors`` holds what went wrong since it was cleared."""

    errors: list[str]


class NetworkTensor(Protocol):
    """An input or output of a network. A new ``shape`` is propagated to the outputs."""

    name: str
    shape: Shape


class Network(Protocol):
    """A network that is being defined."""

    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int, /) -> NetworkTensor:
        """One of the inputs."""

    def get_output(self, index: int, /) -> NetworkTensor:
        """One of the outputs."""


class ParserError(Protocol):
    """Why a node was refused."""

    def node_name(self) -> str:
        """The node's name in the graph."""

    def desc(self) -> str:
        """The reason."""


class Parser(Protocol):
    """Reads an ONNX graph into a network."""

    num_errors: int

    def get_error(self, index: int, /) -> ParserError:
        """One of the errors of the last parse."""

    def load_model_proto(self, model: bytes, /) -> bool:
        """Take a serialised graph."""

    def load_initializer(self, name: str, address: int, size: int, /) -> bool:
        """Take the address of a weight, and its size in bytes."""

    def parse_model_proto(self) -> bool:
        """Parse what was taken; False if there are errors."""


class Profile(Protocol):
    """Sizes that an engine takes."""

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape, /) -> None:
        """Set the smallest, most usual and largest shape of an input."""


class BuilderConfig(Protocol):
    """Options of a build."""

    num_compute_capabilities: int

    def add_optimization_profile(self, profile: Profile, /) -> int:
        """Add sizes."""

    def set_compute_capability(self, capability: Named, index: int, /) -> bool:
        """Set what to build for."""


class Builder(Protocol):
    """Builds engines of networks."""

    def create_network(self, flags: int, /) -> Network:
        """Start an empty network."""

    def create_builder_config(self) -> BuilderConfig:
        """Start with the default options."""

    def create_optimization_profile(self) -> Profile:
        """Start without sizes."""

    def build_serialized_network(
        self, network: Network, config: BuilderConfig, /
    ) -> bytes | None:
        """Build a serialised engine; None if that failed."""


class Named(Protocol):
    """A member of an enumeration, such as the element type ``HALF``."""

    name: str


class Context(Protocol):
    """One execution of an engine. Setters return whether the value fits."""

    def set_input_shape(self, name: str, shape: Shape, /) -> bool:
        """Set the shape of an input."""

    def get_tensor_shape(self, name: str, /) -> Sequence[int]:
        """Shape of an input or output, once all inputs have theirs."""

    def set_tensor_address(self, name: str, address: int, /) -> bool:
        """Set where an input is read or an output written."""

    def execute_async_v3(self, stream: int, /) -> bool:
        """Start on a CUDA stream."""


class Engine(Protocol):
    """A built network."""

    num_io_tensors: int

    def create_execution_context(self) -> Context:
        """Make what runs it."""

    def get_tensor_name(self, index: int, /) -> str:
        """Name of an input or output."""

    def get_tensor_dtype(self, name: str, /) -> Named:
        """Element type of an input or output."""

    def get_tensor_profile_shape(
        self, name: str, profile: int, /
    ) -> Sequence[Sequence[int]]:
        """Smallest, most usual and largest shape of an input."""
