"""What a user imports: `layerstack.read` for results, `layerstack.Client` for a server."""

from importlib.metadata import version

from layerstack.asyncclient import AsyncClient
from layerstack.client import Client
from layerstack.embeddings import Embeddings
from layerstack.errors import LayerstackError
from layerstack.reader import PromptEmbeddings, read

__version__ = version("layerstack")
__all__ = ["AsyncClient", "Client", "Embeddings", "LayerstackError", "PromptEmbeddings", "__version__", "read"]
