"""What fails while a pruned prompt is traced or runs, as errors of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from transformers import PreTrainedModel

from vtprune_fx.errors import (
    AnatomyError,
    CaptureError,
    InputError,
    VtpruneError,
    first_sentence,
)


@contextlib.contextmanager
def errors_of_ours() -> Iterator[None]:
    """Errors of Dynamo and of the model's checks, as errors of this package.

    Raises:
        VtpruneError: As the backend raised it.
        InputError: Images do not fit the prompt's placeholders.
        CaptureError: Dynamo cannot trace the model.
    """
    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, VtpruneError):
            raise error.inner_exception from None
        raise _not_traced(error.inner_exception) from error
    except TorchDynamoException as error:
        raise _not_traced(error) from error
    except RuntimeError as error:
        if (ours := failed_check(str(error))) is not None:
            raise ours from error
        raise


def _not_traced(error: BaseException) -> CaptureError:
    return CaptureError(
        "prompt",
        expected="a model and inputs that torch.compile can trace in one graph",
        found=first_sentence(error),
        fix="Check that the model answers this prompt after vtprune_fx.undo(model). If "
        "it does, this model cannot be pruned.",
    )


def not_pruned(model: PreTrainedModel, found: str) -> AnatomyError:
    """The error for a prompt with images of which nothing would be dropped."""
    return AnatomyError(
        type(model).__name__,
        expected="images whose features stand among the prompt's tokens, to be pruned "
        "by the recipe",
        found=found,
        fix="This model cannot be pruned here. Call vtprune_fx.undo(model) to run it "
        "without pruning.",
    )


def failed_check(message: str) -> InputError | None:
    """The error for a check that failed in a graph; None if it is no such check.

    Args:
        message: The model's check (``passes.async_checks``), or that of
            ``passes.check_tokens``.
    """
    if message.startswith("recipe ") and "visual tokens" in message:
        where, _, rest = message.partition(": ")
        expected, _, fix = rest.partition("; ")
        return InputError(
            where,
            expected=expected,
            found="a sample with fewer",
            fix=f"{fix[:1].upper()}{fix[1:]}.",
        )
    if "torch_compilable_check" in message or "_check_tensor_all" in message:
        return mismatch("another number")
    return None


def mismatch(found: str) -> InputError:
    """The error for images that do not fit the prompt's placeholders."""
    return InputError(
        "images of the prompt",
        expected="as many image features as the prompt has image placeholders",
        found=found,
        fix="Make the prompt by the model's processor, with one placeholder for each "
        "image, and pass input_ids and pixel values of the same call.",
    )
