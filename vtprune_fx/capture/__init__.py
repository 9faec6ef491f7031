"""From a model, or from Dynamo, to an ATen graph before dispatch."""
