"use strict";
// Tables whose heads sort them.

// columns: [{name, title, number, text}]; text(row) gives what is shown, row[name] what is sorted by.
E.table = (columns, rows, { sort, go = null } = {}) => {
  const body = E.el("tbody");
  let [by, down] = sort ?? [columns[0].name, false];
  const order = (a, b) => {
    const [x, y] = [a[by], b[by]];
    if (x === null || x === undefined || y === null || y === undefined) {
      return (x === null || x === undefined) - (y === null || y === undefined); // what is missing comes last
    }
    return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))) * (down ? -1 : 1);
  };
  const heads = columns.map((column) => {
    const button = E.el("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      down = by === column.name ? !down : Boolean(column.number);
      by = column.name;
      fill();
    });
    return E.el("th", { className: column.number ? "number" : "", scope: "col" }, button);
  });
  const fill = () => {
    heads.forEach((head, i) => {
      if (columns[i].name === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(
      ...[...rows].sort(order).map((row) => {
        const cells = columns.map((column) => {
          const text = column.text ? column.text(row) : column.number ? E.number(row[column.name]) : String(row[column.name] ?? "");
          return E.el("td", { className: column.number ? "number" : "", "data-head": column.title }, text);
        });
        const line = E.el("tr", { className: go ? "go" : "" }, ...cells);
        if (go) line.addEventListener("click", (event) => event.target.closest("code, details") || go(row)); // these are for reading
        return line;
      }),
    );
  };
  fill();
  return E.el("div", { className: "scroll", tabIndex: 0 }, E.el("table", {}, E.el("thead", {}, E.el("tr", {}, ...heads)), body));
};

// A row per name, a column per run; rows in which the runs differ stand out. `facts` has titles of names: numbers, which differ anyway.
E.sideBySide = (runs, names, value, { onlyDifferent = false, facts = null } = {}) => {
  const lines = names
    .map((name) => [name, runs.map((run) => value(run, name))])
    .map(([name, values]) => ({ name, values, differs: runs.length > 1 && new Set(values).size > 1 }))
    .filter((line) => !onlyDifferent || line.differs);
  const head = E.el("tr", {}, E.el("th", {}), ...runs.map((run, i) => E.el("th", { scope: "col" }, facts ? E.key(E.runColor(i)) : null, run.name)));
  const body = lines.map((line) =>
    E.el("tr", { className: onlyDifferent || facts || !line.differs ? "" : "differs" }, E.el("td", {}, facts?.[line.name] ?? line.name), ...line.values.map((text) => E.el("td", {}, text))),
  );
  return E.el("div", { className: "scroll", tabIndex: 0 }, E.el("table", {}, E.el("thead", {}, head), E.el("tbody", {}, ...body)));
};
