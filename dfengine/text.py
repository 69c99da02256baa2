"""Text from files and other machines, made safe to print."""

import re

#: What a terminal acts on instead of showing it: controls (C0, DEL, C1), line separators, marks that reverse the order
#: of what follows; and halves of surrogate pairs, which cannot be printed at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text on one line, with everything that a terminal would act on as Python escapes it: `\\x1b`, `\\n`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
