"use strict";
// Every text of the data goes through textContent; nothing is parsed as HTML.
(() => {
  const PAGE = 50;
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const questions = data.questions;
  let found = [];
  let first = 0;

  function element(tag, className, text) {
    const e = document.createElement(tag);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  }

  const number = (x) => (x === undefined || x === null ? "–" : x.toFixed(2));
  const words = (name) => name.replaceAll("_", " ");

  function verdict(q) {
    const accuracy = q.metrics && q.metrics.accuracy;
    if (accuracy === undefined) return "";
    return accuracy >= 1 ? "right" : accuracy > 0 ? "partly" : "wrong";
  }

  // ---- search and filters ----
  function textOf(q) {
    if (q.searched === undefined) {
      const used = new Set((q.tree || []).map((n) => n.passage).filter((p) => p !== undefined));
      (q.citations || []).forEach((c) => used.add(c[1]));
      const passages = [...used].map((p) => data.passages[p].title + "\n" + data.passages[p].text);
      const parts = [q.id, q.question, q.answer, ...(q.gold || []), ...passages];
      q.searched = parts.join("\n").toLowerCase();
    }
    return q.searched;
  }

  function filter() {
    const wanted = byId("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const system = byId("system").value, task = byId("task").value, right = byId("right").value;
    const notRetrieved = byId("not-retrieved").checked, unsupported = byId("unsupported").checked;
    found = questions.filter((q) =>
      (!system || q.system === system) &&
      (!task || q.task === task) &&
      (!right || verdict(q) === right) &&
      (!notRetrieved || !q.retrieved) &&
      (!unsupported || q.unsupported) &&
      wanted.every((word) => textOf(q).includes(word)));
    first = 0;
    show();
  }

  function show() {
    const last = Math.min(first + PAGE, found.length);
    byId("list").replaceChildren(...found.slice(first, last).map(card));
    const of = found.length === 1 ? "1 answer" : found.length.toLocaleString("en") + " answers";
    byId("count").textContent = of;
    byId("place").textContent = found.length ? `${first + 1} to ${last} of ${found.length}` : "none";
    byId("previous").disabled = first === 0;
    byId("next").disabled = last === found.length;
  }

  function turn(by) {
    first += by;
    show();
    const top = byId("list").querySelector("summary");
    if (top) top.focus();
  }

  function options(select, values, title) {
    select.replaceChildren();
    [["", "all"], ...values.map((v) => [v, title(v)])].forEach(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      select.append(option);
    });
    select.parentElement.hidden = values.length < 2;
  }

  // ---- one question ----
  function card(q) {
    const details = element("details", "card");
    const summary = element("summary");
    summary.append(element("span", "q", q.question), element("span", "a", q.answer || "(no answer)"));
    const tags = element("span", "tags");
    const kind = verdict(q);
    if (kind) tags.append(element("span", `tag ${kind}`, kind === "partly" ? "partly right" : kind));
    tags.append(element("span", "tag", q.retrieved ? "retrieved" : "not retrieved"));
    if (q.unsupported) tags.append(element("span", "tag partly", "unsupported"));
    if (Object.keys(data.systems).length > 1) {
      tags.append(element("span", "", data.systems[q.system]));
    }
    if (data.tasks.length > 1) tags.append(element("span", "", words(q.task)));
    summary.append(tags);
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(body(q));
    });
    return details;
  }

  function body(q) {
    const box = element("div", "body");
    const prefix = `q${questions.indexOf(q)}`;
    const facts = element("dl", "facts");
    const fact = (name, value) => {
      const dd = element("dd");
      dd.append(value);
      facts.append(element("dt", "", name), dd);
    };
    fact("answer", cited(q, prefix));
    if (q.gold) fact("gold", q.gold.join(" · "));
    if (q.score !== undefined) fact("score", number(q.score));
    Object.entries(q.metrics || {}).forEach(([name, v]) => fact(words(name), number(v)));
    if (q.popularity !== undefined) fact("popularity", q.popularity.toLocaleString("en"));
    fact("id", q.id);
    box.append(facts);
    (q.notices || []).forEach((text) => box.append(element("p", "notice", `Note: ${text}`)));
    if (q.error) box.append(element("p", "wrong", `Failed: ${q.error}`));
    if (q.tree) {
      box.append(element("h3", "", "Search tree"));
      if (q.p !== undefined) {
        const decision = bar("Decision", [q.p], ["p(retrieve)"], ["b3"]);
        decision.className = "decision";
        decision.firstChild.append(q.retrieved ? ": retrieved" : ": no retrieval");
        box.append(decision);
      }
      box.append(branches(q, -1, prefix) || element("p", "muted", "empty"));
    } else {
      box.append(element("p", "muted", "This system has no search tree."));
    }
    return box;
  }

  // The answer, with marks that lead to the node that used the cited passage.
  function cited(q, prefix) {
    const text = element("span");
    if (!q.citations) {
      text.textContent = q.answer || "(no answer)";
      return text;
    }
    const marks = [...new Set(q.citations.map((c) => c[1]))];
    const path = (q.tree || []).filter((n) => n.chosen);
    const segments = q.segments || [q.answer];
    segments.forEach((segment, i) => {
      text.append(i ? " " : "", segment);
      q.citations.filter((c) => c[0] === i).forEach((c) => {
        const passage = data.passages[c[1]];
        const link = element("a", "", `[${marks.indexOf(c[1]) + 1}]`);
        const node = path[i] && path[i].passage === c[1] ? path[i]
          : (q.tree || []).find((n) => n.passage === c[1]);
        if (node) link.href = `#${prefix}-${node.id}`;
        link.title = `${passage.title}: ${c[2]}`;
        text.append(" ", link);
      });
    });
    if (segments.join(" ") !== q.answer) {
      const both = element("span");
      both.append(q.answer || "(no answer)", element("br"), "segments: ", text);
      return both;
    }
    return text;
  }

  function branches(q, parent, prefix) {
    const children = q.tree.filter((n) => n.parent === parent);
    if (!children.length) return null;
    const list = element("ul", parent === -1 ? "tree" : "");
    children.sort((a, b) => (b.chosen ? 1 : 0) - (a.chosen ? 1 : 0) || b.score - a.score);
    children.forEach((n) => {
      const item = element("li");
      item.append(node(n, prefix));
      const below = branches(q, n.id, prefix);
      if (below) item.append(below);
      list.append(item);
    });
    return list;
  }

  function node(n, prefix) {
    const box = element("div", n.chosen ? "node chosen" : "node");
    box.id = `${prefix}-${n.id}`;
    box.tabIndex = -1;
    const head = element("div", "tags");
    if (n.chosen) head.append(element("span", "tag right", "chosen"));
    if (n.dropped) head.append(element("span", "tag wrong", "dropped by a constraint"));
    if (n.action) head.append(element("span", "", words(n.action)));
    box.append(element("div", "", n.text || "(no text)"), head);
    if (n.passage !== undefined) {
      const p = data.passages[n.passage];
      box.append(element("div", "passage", p.title ? `${p.title}: ${p.text}` : p.text));
    }
    const numbers = element("div", "numbers");
    if (n.isrel) numbers.append(bar("IsRel", [n.isrel[1]], ["relevant"], ["b3"]));
    if (n.issup) {
      numbers.append(bar("IsSup", n.issup, ["full", "partial", "none"], ["b0", "b1", "b2"]));
    }
    const best = n.isuse.indexOf(Math.max(...n.isuse));
    numbers.append(bar("IsUse", [n.isuse[best]], [`utility ${best + 1}`], ["b3"]));
    const rest = [`p(segment) ${number(n.p)}`, `score ${number(n.score)}`];
    if (n.retrieve !== undefined) rest.unshift(`p(retrieve) ${number(n.retrieve)}`);
    numbers.append(element("div", "", rest.join(", ")));
    box.append(numbers);
    return box;
  }

  function bar(name, values, labels, classes) {
    const box = element("div");
    const told = values.map((v, i) => `${labels[i]} ${number(v)}`).join(", ");
    box.append(element("div", "", `${name}: ${told}`));
    const track = element("div", "bar");
    track.setAttribute("aria-hidden", "true"); // the text above says the same
    values.forEach((v, i) => {
      const part = element("span", classes[i]);
      part.style.width = `${100 * (v || 0)}%`;
      track.append(part);
    });
    box.append(track);
    return box;
  }

  // A link to a node moves the focus there as well.
  byId("list").addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    const target = link && byId(link.getAttribute("href").slice(1));
    if (target) target.focus();
  });

  options(byId("system"), Object.keys(data.systems), (s) => data.systems[s]);
  options(byId("task"), data.tasks, words);
  ["system", "task", "right", "not-retrieved", "unsupported"].forEach((id) =>
    byId(id).addEventListener("change", filter));
  let waiting = 0;
  byId("text").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  byId("previous").addEventListener("click", () => turn(-PAGE));
  byId("next").addEventListener("click", () => turn(PAGE));
  byId("no-script").hidden = true;
  if (questions.length) {
    byId("browser").hidden = false;
    filter();
  }
})();
