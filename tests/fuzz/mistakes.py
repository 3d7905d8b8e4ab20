"""mistakes.py - the sources of the cache with one mistake in them at a time: does the fuzzer notice?

Each entry replaces one statement. The changed file becomes a library that is preloaded over libllama, in seconds.

SPDX-License-Identifier: MIT
"""

from typing import NamedTuple


class Mistake(NamedTuple):
    name: str
    file: str
    statement: str   # as it stands in the file, once
    instead: str = ""


MISTAKES = [
    Mistake("a cut does not open the tile again", "kvarn-cache.cpp",
            "tiles[tile].state   = OPEN;\n                tiles[tile].is_sink = false;"),
    Mistake("an empty tile stays in use", "kvarn-cache.cpp",
            "if (n == 0) {\n                free_tile(tile);\n            }", "if (n == 0) { continue; }"),
    Mistake("a batch that was only tried is not taken back", "kvarn-cache.cpp",
            "static_cast<kvarn_placement &>(*this) = saved;"),
    Mistake("a sink gives its slot away", "kvarn-cache.cpp",
            "if (t.state == CACHED && !t.is_sink &&", "if (t.state == CACHED &&"),
    Mistake("a slot does not know its tile", "kvarn-cache.cpp", "slot_tile[slot] = tile;\n    return slot;", "return slot;"),
    Mistake("a tile that loses its slot stays as it was", "kvarn-cache.cpp",
            "tiles[slot_tile[slot]].state = SEALED;\n        tiles[slot_tile[slot]].slot  = -1;"),
    Mistake("a full tile is not sealed", "kvarn-cache.cpp", "seal_list.push_back(tile);"),
    Mistake("a copied stream lacks its open tile", "kvarn-cache.cpp",
            "copies.push_back({ (uint32_t) tiles[from].slot, (uint32_t) tiles[to].slot, true });"),
    Mistake("a copied stream lacks its sealed tiles", "kvarn-cache.cpp", "copies.push_back({ from, to, false });"),
    Mistake("the keys of sealed tiles are not turned", "kvarn-cache-shift.cpp",
            "is_rehearsal = false;\n        return turn_sealed() && turn_tail();",
            "is_rehearsal = false;\n        return turn_tail();"),
    Mistake("a tile whose rows were turned is not sealed again", "kvarn-cache-shift.cpp",
            "if (kvarn.tiles[tile].state == CACHED) {", "if (false) {"),
    Mistake("a state forgets the shifts to come", "kvarn-cache-state.cpp", "record.put(cells.get_shift(cell));",
            "record.put((llama_pos) 0);"),
    Mistake("the copies between streams are forgotten by a state", "kvarn-cache-state.cpp",
            "copy_pending();\n\n    kvarn_write(io, KVARN_STATE_MAGIC);", "kvarn_write(io, KVARN_STATE_MAGIC);"),
    Mistake("compaction writes the same rows into every tile", "kvarn-cache-host.cpp", "r.write(from[i], i*KVARN_G, n);",
            "r.write(from[i], 0, n);"),
    Mistake("compaction reads a tile by its slot when it has none", "kvarn-cache-host.cpp",
            "} else if (kvarn.tiles[tile].slot >= 0) {", "} else if (true) {"),
    Mistake("a restored full tile is sealed from nothing", "kvarn-cache-host.cpp",
            "rows.write(tile, 0, KVARN_G);", "rows.write(tile, 0, 0);"),
]
