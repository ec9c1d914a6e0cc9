"""What can go wrong while measuring. The text of each exception is one sentence for the person at the screen."""

from __future__ import annotations


class MeasureError(Exception):
    """Base class: anything a user or a server can cause; never a bug of ours."""


class ServerUnreachable(MeasureError):
    """No ComfyUI answers at the address."""


class ServerDied(MeasureError):
    """The connection broke after a run had been queued."""


class ServerRefused(MeasureError):
    """The server answered a plain request with an HTTP error."""


class InvalidWorkflow(MeasureError):
    """ComfyUI's validation refused the workflow.

    `node_id`, `class_type` and `field` name the culprit; each may be empty when the server did not say.
    """

    def __init__(self, message: str, node_id: str = "", class_type: str = "", field: str = ""):
        super().__init__(message)
        self.node_id, self.class_type, self.field = node_id, class_type, field


class ExecutionFailed(MeasureError):
    """A node raised while the workflow ran."""

    def __init__(self, message: str, node_id: str = "", class_type: str = ""):
        super().__init__(message)
        self.node_id, self.class_type = node_id, class_type


class Interrupted(MeasureError):
    """Somebody pressed cancel in ComfyUI."""


class Stopped(MeasureError):
    """The stop event of this comparison was set; finished measurements are kept."""


class RunTimeout(MeasureError):
    """A run took longer than allowed and was interrupted."""


class WorkflowError(MeasureError):
    """The workflow file cannot be read, or lacks what the comparison has to set."""


class CannotWrite(MeasureError):
    """The disk is full, or the folder of a comparison cannot be written; finished measurements are kept."""


class ReportError(MeasureError):
    """A report file cannot be read, or has a major version that this reader does not know."""
