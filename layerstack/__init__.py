"""What a user imports: `layerstack.read` for results, `layerstack.Client` for a server."""

from importlib.metadata import version

from layerstack.client import Client, Embeddings
from layerstack.errors import LayerstackError
from layerstack.reader import PromptEmbeddings, read

__version__ = version("layerstack")
__all__ = ["Client", "Embeddings", "LayerstackError", "PromptEmbeddings", "__version__", "read"]
