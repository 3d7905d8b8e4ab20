"""Tells what a model thinks from what it answers, while the text is still coming in pieces of any size.

SPDX-License-Identifier: MIT
"""

TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


def opens(prompt: str) -> str:
    """The end tag to wait for, if a chat template ends with a start tag; "" if the answer begins with an answer."""
    for start, end in TAGS:
        if prompt.rstrip().endswith(start):
            return end
    return ""


class Splitter:
    """for is_thinking, text in splitter.feed(piece): ...; and once more with what splitter.finish() gives."""

    def __init__(self, end: str = ""):
        self.end = end           # the tag that ends the thinking going on; "": none is
        self.held = ""           # may be the beginning of a tag

    def feed(self, piece: str) -> "list[tuple[bool, str]]":
        text, out = self.held + piece, []
        self.held = ""
        while text:
            wanted = [self.end] if self.end else [start for start, _ in TAGS]
            found = min(((text.find(tag), tag) for tag in wanted if tag in text), default=None)
            if found is None:
                keep = max((n for tag in wanted for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
                text, self.held = text[:len(text) - keep], text[len(text) - keep:]
                if text:
                    out.append((bool(self.end), text))
                break
            place, tag = found
            if place:
                out.append((bool(self.end), text[:place]))
            text = text[place + len(tag):]
            self.end = "" if self.end else dict(TAGS)[tag]
        return out

    def finish(self) -> "list[tuple[bool, str]]":
        """What was held back and turned out to be no tag."""
        held, self.held = self.held, ""
        return [(bool(self.end), held)] if held else []
