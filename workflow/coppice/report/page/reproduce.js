// Failures, and how to reproduce the study

function buildFailures() {
  const section = byId("failures");
  section.append(heading("failures", "Failures"));
  if (!failures.length) {
    section.append(empty("Nothing failed."));
    return;
  }
  section.append(
    make(
      "ul",
      { class: "failures" },
      failures.map(({ node, stage, error, log }) =>
        make(
          "li",
          {},
          make("p", {}, make("b", {}, node || "the study"), ` failed in ${stage}`),
          make("p", { class: "error" }, error ?? ""),
          log ? make("p", { class: "note" }, "Log: ", make("code", {}, log)) : null,
        ),
      ),
    ),
  );
}

function buildReproduce() {
  const section = byId("reproduce");
  section.append(heading("reproduce", "How to reproduce"));
  const commands = study.reproduce ?? [];
  if (commands.length) section.append(copyable(commands.join("\n"), "the commands of the whole study"));
  const single = nodes.filter(({ command }) => command);
  if (single.length) {
    section.append(
      foldable(`The command of each node (${single.length})`, () =>
        table(
          ["node", "command"],
          single.map(({ node, command }) => [node, copyable(command, `the command of ${node}`)]),
          2,
        ),
      ).details,
    );
  }
  if (study.config) section.append(foldable("The study's config", () => copyable(study.config, "the config")).details);
  const versions = Object.entries(study.versions ?? {});
  if (versions.length)
    section.append(foldable(`Versions (${versions.length})`, () => table(["package", "version"], versions, 2)).details);
  if (study.version) section.append(note(`Written by ${study.version}, seed ${study.seed ?? 0}.`));
}
