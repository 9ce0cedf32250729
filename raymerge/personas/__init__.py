"""Examples by persona: files read under any names of columns, splits, and prompts rendered for a model.

`examples` is what they are, `sources` reads them: `files` finds and opens the files, `columns` brings them under our
names, `chats` takes messages apart, `splits` makes splits where no column names them. `prompts` renders. `recognise`
guesses what a file's columns are.
"""

from raymerge.config import PersonaSource
from raymerge.personas.examples import SPLITS, Example, Personas, Split, from_examples
from raymerge.personas.files import FORMS
from raymerge.personas.prompts import ChatTokenizer, Turn, plain_text, render_prompt
from raymerge.personas.recognise import Recognised, recognise
from raymerge.personas.sources import read_personas, source_of

__all__ = [
    "FORMS",
    "SPLITS",
    "ChatTokenizer",
    "Example",
    "PersonaSource",
    "Personas",
    "Recognised",
    "Split",
    "Turn",
    "from_examples",
    "plain_text",
    "read_personas",
    "recognise",
    "render_prompt",
    "source_of",
]
