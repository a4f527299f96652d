"""A contract for import-linter that states every arrow between the rooms of a package: who may import whom directly.

Each line of ``arrows`` is "room -> room, room"; every room may import those in ``everyone``. An import without an
arrow, an arrow without an import, a room without a line, and a cycle of arrows break the contract.
"""

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class RoomsContract(Contract):
    """Compares the arrows with the imports."""

    type_name = "rooms"

    package = fields.StringField()
    arrows = fields.ListField(subfield=fields.StringField())
    everyone = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Return whether arrows and imports agree."""
        package, everyone = str(self.package), set(self._words("everyone"))
        stated = {}
        for line in self._words("arrows"):
            room, _, others = line.partition("->")
            stated[room.strip()] = {other.strip() for other in others.split(",") if other.strip()}
        found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        rooms = {child.removeprefix(f"{package}.") for child in graph.find_children(package)}
        for importer in graph.modules:
            for imported in graph.find_modules_directly_imported_by(importer):
                if importer.startswith(f"{package}.") and imported.startswith(f"{package}."):
                    pair = (importer.split(".")[1], imported.split(".")[1])
                    if pair[0] != pair[1]:
                        found[pair].append(f"{importer} -> {imported}")
        problems = [
            line
            for (room, other), lines in sorted(found.items())
            if other not in stated.get(room, set()) | everyone
            for line in sorted(lines)
        ]
        problems += [
            f"{room} -> {other}: no such import; remove the arrow"
            for room, others in stated.items()
            for other in sorted(others)
            if (room, other) not in found
        ]
        problems += [f"{room}: no line of its arrows" for room in sorted(rooms - stated.keys() - everyone)]
        problems += [f"{room}: no such room" for room in sorted((stated.keys() | everyone) - rooms)]
        try:
            TopologicalSorter(stated).prepare()
        except CycleError as error:
            problems.append(f"a cycle of arrows: {' -> '.join(error.args[1])}")
        return ContractCheck(kept=not problems, metadata={"problems": problems})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print what does not agree."""
        for problem in check.metadata["problems"]:
            output.print_error(f"- {problem}")

    def _words(self, name: str) -> list[Any]:
        return list(getattr(self, name))
