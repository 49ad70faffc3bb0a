"use strict";
// Markdown to DOM nodes. A model's text reaches the page through text nodes alone, never as HTML, and links only with
// the schemes below; images become links, as showing them would ask another server. Knows nothing of chats.

const Markdown = (() => {
  const SCHEMES = ["http:", "https:", "mailto:"];
  const DEEPEST = 12; // nested quotes, lists and emphasis; what is deeper stays plain
  const LONGEST_HIGHLIGHT = 60000; // characters

  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children);
    return node;
  }

  // ---- inline ----

  function safeLink(target) {
    try {
      const url = new URL(target);
      return SCHEMES.includes(url.protocol) ? url.href : null;
    } catch {
      return null; // relative: nothing here for a model to point at
    }
  }

  function link(href, children) {
    const node = element("a", "", ...children);
    node.href = href;
    node.rel = "noopener noreferrer";
    node.target = "_blank";
    return node;
  }

  const SPECIAL = /[\\`*_~[!<&\n]|https?:\/\//g;
  const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
  const EMPHASIS = [["***", "strong", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
  const isWord = (char) => char !== undefined && /[\p{L}\p{N}]/u.test(char);
  const isSpace = (char) => char === undefined || /\s/.test(char);

  /** Find where emphasis opened at `from` ends, or -1. `absent` remembers marks known not to close any more. */
  function closing(text, mark, from, absent) {
    if (absent.has(mark)) return -1;
    for (let at = text.indexOf(mark, from + 1); at > 0; at = text.indexOf(mark, at + 1)) {
      const before = text[at - 1], after = text[at + mark.length];
      if (mark.length === 1 && after === mark) { at += 1; continue; } // a longer mark inside of this one
      if (isSpace(before) || before === "\\") continue;
      if (mark[0] === "_" && isWord(after)) continue;
      return at;
    }
    absent.add(mark);
    return -1;
  }

  function inline(text, depth = 0) {
    const nodes = [];
    const absent = new Set();
    let plain = "", at = 0;
    const add = (node, next) => {
      if (plain) nodes.push(document.createTextNode(plain));
      plain = "";
      nodes.push(node);
      at = next;
    };
    while (at < text.length) {
      SPECIAL.lastIndex = at;
      const found = depth > DEEPEST ? null : SPECIAL.exec(text);
      if (!found) { plain += text.slice(at); break; }
      plain += text.slice(at, found.index);
      at = found.index;
      const special = span(text, at, absent, depth);
      if (special) add(...special);
      else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) { plain += text[at + 1]; at += 2; }
      else { plain += found[0]; at += found[0].length; }
    }
    if (plain) nodes.push(document.createTextNode(plain));
    return nodes;
  }

  /** Read what begins at `at`: [node, where it ends], or null if it is plain text after all. */
  function span(text, at, absent, depth) {
    const char = text[at];
    if (char === "&") {
      const entity = /^&(?:amp|lt|gt|quot|#39|nbsp);/.exec(text.slice(at, at + 6))?.[0];
      return entity && [document.createTextNode(ENTITIES[entity]), at + entity.length];
    }
    if (char === "\n") return [element("br"), at + 1];
    if (char === "\\" && text[at + 1] === "\n") return [element("br"), at + 2];
    if (char === "`") return codeSpan(text, at, absent);
    if (char === "[" || (char === "!" && text[at + 1] === "[")) return linkSpan(text, at, depth);
    if (char === "<" || char === "h") return bareLink(text, at);
    for (const [mark, ...tags] of EMPHASIS) {
      if (!text.startsWith(mark, at) || isSpace(text[at + mark.length])) continue;
      if (mark[0] === "_" && isWord(text[at - 1])) continue;
      const end = closing(text, mark, at + mark.length - 1, absent);
      if (end < 0 || end === at + mark.length) continue;
      const inner = inline(text.slice(at + mark.length, end), depth + 1);
      return [tags.reduceRight((children, tag) => [element(tag, "", ...children)], inner)[0], end + mark.length];
    }
    return null;
  }

  function codeSpan(text, at, absent) {
    const ticks = /^`+/.exec(text.slice(at, at + 64))[0];
    if (absent.has(ticks)) return null;
    for (let end = text.indexOf(ticks, at + ticks.length); end > 0; end = text.indexOf(ticks, end + 1)) {
      if (text[end + ticks.length] === "`" || text[end - 1] === "`") continue;
      const inner = text.slice(at + ticks.length, end).replaceAll("\n", " ");
      return [element("code", "", /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner), end + ticks.length];
    }
    absent.add(ticks);
    return null;
  }

  function linkSpan(text, at, depth) {
    const image = text[at] === "!";
    const found = /^!?\[((?:\\.|[^\[\]\\]|\[[^\[\]]*\])*)\]\(\s*<?((?:[^\s()<>]|\([^\s()]*\))+)>?(?:\s+"[^"]*")?\s*\)/.exec(text.slice(at, at + 4000));
    if (!found) return null;
    const href = safeLink(found[2]);
    const label = found[1] || (image ? "image" : found[2]);
    if (!href) return [element("span", "", ...inline(label, depth + 1)), at + found[0].length];
    return [link(href, image ? [`Image: ${label}`] : inline(label, depth + 1)), at + found[0].length];
  }

  function bareLink(text, at) {
    const found = /^<(https?:\/\/[^\s<>]+|mailto:[^\s<>]+)>|^https?:\/\/[^\s<>"'`]+/.exec(text.slice(at, at + 4000));
    if (!found) return null;
    let shown = found[1] ?? found[0].replace(/[.,;:!?*_~]+$/, "");
    if (!found[1] && shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
    const href = safeLink(shown);
    return href && [link(href, [shown]), at + (found[1] ? found[0].length : shown.length)];
  }

  // ---- highlighting: strings, comments, numbers, key words; enough to read by ----

  const words = (text) => text.split(" ");
  const C_WORDS = words("abstract as async await bool boolean break case catch char class const constexpr continue def default delete do double dyn else enum export extends extern false final finally float fn for from func function go if impl implements import in inline instanceof int interface let long loop map match mod move mut namespace new nil null nullptr of operator override package private protected pub public range return self short signed sizeof static string struct super switch template this throw trait true try type typedef typename typeof undefined union unsigned use using val var virtual void volatile when where while with yield");
  const PYTHON_WORDS = words("and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try while with yield");
  const SHELL_WORDS = words("alias begin break case class continue def do done elif else elsif end ensure esac exit export false fi for function if in local module next nil null require rescue return self set then true unless until when while yield");
  const SQL_WORDS = words("add all alter and as asc begin between by case check column commit constraint create cross database default delete desc distinct drop else end exists foreign from full group having if in index inner insert into is join key left like limit not null offset on or order outer primary references right rollback select set table then union unique update values view when where with");
  const FAMILIES = [
    [words("js javascript jsx ts typescript tsx c h cpp c++ cc java kotlin kt swift rust rs go golang csharp cs c# php scala dart cuda glsl zig json jsonc css scss"), C_WORDS, "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)"],
    [words("py python pyi"), PYTHON_WORDS, "#[^\\n]*"],
    [words("rb ruby sh bash shell zsh console yaml yml toml r perl make makefile dockerfile ini conf elixir"), SHELL_WORDS, "(?<![^\\s])#[^\\n]*"],
    [words("sql sqlite postgresql mysql lua haskell hs"), SQL_WORDS, "--[^\\n]*"],
    [words("html xml svg vue"), [], "<[!]--[\\s\\S]*?(?:--[>]|$)"],
  ];
  const STRINGS = "\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|(?<![\\p{L}\\p{N}])'(?:\\\\.|[^'\\\\\\n])*'|`(?:\\\\.|[^`\\\\])*`?";
  const NUMBERS = "\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";
  const rules = new Map();

  function ruleOf(language) {
    if (!rules.has(language)) {
      const family = FAMILIES.find(([names]) => names.includes(language));
      if (!family) return null;
      const [, keywords, comments] = family;
      const ofWords = keywords.length ? `\\b(?:${keywords.join("|")})\\b` : "</?[A-Za-z][\\w-]*|/?>";
      const flags = keywords === SQL_WORDS ? "giu" : "gu";
      rules.set(language, new RegExp(`(?<c>${comments})|(?<s>${STRINGS})|(?<k>${ofWords})|(?<n>${NUMBERS})`, flags));
    }
    return rules.get(language);
  }

  function highlighted(code, language) {
    const rule = code.length > LONGEST_HIGHLIGHT ? null : ruleOf(language);
    if (!rule) return [code];
    const nodes = [];
    let done = 0;
    for (const found of code.matchAll(rule)) {
      nodes.push(code.slice(done, found.index));
      const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
      nodes.push(element("span", kind, found[0]));
      done = found.index + found[0].length;
    }
    nodes.push(code.slice(done));
    return nodes;
  }

  function codeBlock(code, info) {
    const language = info.trim().split(/[\s{,]/)[0].toLowerCase();
    const copy = element("button", "quiet", "Copy");
    copy.type = "button";
    copy.dataset.copy = "code"; // chat_page.js listens
    copy.setAttribute("aria-label", language ? `Copy the ${language} code` : "Copy the code");
    const pre = element("pre", "", element("code", "", ...highlighted(code, language)));
    pre.tabIndex = 0; // scrolls by keyboard
    return element("div", "block", element("div", "bar", element("span", "", language || "text"), copy), pre);
  }

  // ---- blocks ----

  const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
  const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
  const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
  const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
  const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
  const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") &&
    DELIMITERS.test(lines[at + 1]) && cells(lines[at]).length === cells(lines[at + 1]).length;
  const isBlank = (line) => line.trim() === "";

  /** Cut text into top-level blocks: [kind, lines] each. The last one may still be growing. */
  function blocks(text) {
    const lines = text.split("\n");
    const found = [];
    for (let at = 0; at < lines.length;) {
      const [kind, next] = blockAt(lines, at);
      if (kind !== "blank") found.push([kind, lines.slice(at, next)]);
      at = next;
    }
    return found;
  }

  function blockAt(lines, at) {
    const line = lines[at];
    if (isBlank(line)) return ["blank", at + 1];
    const fence = FENCE.exec(line);
    if (fence) {
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      let end = at + 1;
      while (end < lines.length && !close.test(lines[end])) end += 1;
      return ["code", Math.min(end + 1, lines.length)];
    }
    if (HEADING.test(line)) return ["heading", at + 1];
    if (RULE.test(line)) return ["rule", at + 1];
    if (/^ {0,3}>/.test(line)) return ["quote", until(lines, at, (next) => !/^ {0,3}>/.test(next))];
    if (ITEM.test(line)) return ["list", listEnd(lines, at)];
    if (isTable(lines, at)) return ["table", until(lines, at + 1, (next) => !next.includes("|"))];
    return ["paragraph", until(lines, at, (next, index) => isBlank(next) || FENCE.test(next) || HEADING.test(next) || RULE.test(next) ||
      /^ {0,3}>/.test(next) || /^ {0,3}(?:[-*+]|1[.)])\s+\S/.test(next) || isTable(lines, index))];
  }

  function until(lines, at, ends) {
    let next = at + 1;
    while (next < lines.length && !ends(lines[next], next)) next += 1;
    return next;
  }

  /** A list goes on through indented lines, further items of its kind, and blank lines between those. */
  function listEnd(lines, at) {
    const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
    let next = at + 1, fence = null;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      const mark = FENCE.exec(line.trimStart());
      if (mark && /^\s/.test(line)) fence = fence ? null : mark;
      if (fence || isBlank(line)) continue;
      const item = ITEM.exec(line);
      if (item && !RULE.test(line) && (item[1].length > 1 || /\d/.test(item[2]) === ordered)) continue;
      if (/^ {2,}|^\t/.test(line)) continue;
      if (!isBlank(lines[next - 1]) && !FENCE.test(line) && !HEADING.test(line) && !RULE.test(line) && !item && !/^ {0,3}>/.test(line)) continue;
      break;
    }
    while (isBlank(lines[next - 1])) next -= 1;
    return next;
  }

  function list(lines, depth) {
    const first = ITEM.exec(lines[0]);
    const node = element(/\d/.test(first[2]) ? "ol" : "ul");
    if (node.tagName === "OL") node.start = parseInt(first[2], 10);
    const items = [];
    let fenced = false;
    for (const line of lines) {
      const item = ITEM.exec(line);
      if (item && !fenced && item[1].length <= first[1].length + 1) {
        const mark = item[0].length - item[3].length;
        items.push({ width: mark + Math.min(Math.max(item[3].length, 1), 4), lines: [line.slice(mark).trimStart()] });
      } else {
        const { width, lines: own } = items.at(-1);
        const indent = /^ */.exec(line.replaceAll("\t", "    "))[0].length;
        own.push(line.replaceAll("\t", "    ").slice(Math.min(indent, width)));
      }
      if (FENCE.test(items.at(-1).lines.at(-1))) fenced = !fenced;
    }
    for (const { lines: own } of items) node.append(listItem(own, depth));
    return node;
  }

  function listItem(lines, depth) {
    const task = /^\[([ xX])\]\s+/.exec(lines[0]);
    if (task) lines[0] = lines[0].slice(task[0].length);
    const parts = blocks(lines.join("\n"));
    const tight = parts.filter(([kind]) => kind === "paragraph").length < 2;
    const item = element("li", task ? "task" : "");
    if (task) item.append(task[1] === " " ? "☐ " : "☑ ");
    for (const part of parts) item.append(...(part[0] === "paragraph" && tight ? inline(paragraphText(part[1])) : [block(part, depth + 1)]));
    return item;
  }

  function cells(line) {
    const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  }

  function table(lines) {
    const sides = cells(lines[1]).map((cell) => (/^:.*:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : ""));
    const row = (line, tag) => {
      const found = cells(line);
      return element("tr", "", ...sides.map((side, column) => element(tag, side, ...inline(found[column] ?? ""))));
    };
    const body = element("tbody", "", ...lines.slice(2).map((line) => row(line, "td")));
    const frame = element("div", "table", element("table", "", element("thead", "", row(lines[0], "th")), body));
    frame.tabIndex = 0;
    return frame;
  }

  const paragraphText = (lines) => lines.map((line) => line.trim()).join("\n");

  function block([kind, lines], depth = 0) {
    if (kind === "code") {
      const fence = FENCE.exec(lines[0]);
      const closed = lines.length > 1 && new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`).test(lines.at(-1));
      return codeBlock(lines.slice(1, closed ? -1 : undefined).join("\n"), fence[2]);
    }
    if (kind === "heading") {
      const found = HEADING.exec(lines[0]);
      return element(`h${found[1].length}`, "", ...inline(found[2] ?? ""));
    }
    if (kind === "rule") return element("hr");
    if (kind === "table") return table(lines);
    if (depth < DEEPEST && kind === "list") return list(lines, depth);
    if (depth < DEEPEST && kind === "quote") {
      const inner = lines.map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
      return element("blockquote", "", ...blocks(inner).map((part) => block(part, depth + 1)));
    }
    return element("p", "", ...inline(paragraphText(lines)));
  }

  /** Keep a node showing a growing text: blocks that did not change keep their nodes, and what is selected in them. */
  function view(container) {
    let shown = [];
    return (text) => {
      const wanted = blocks(text.replaceAll("\r\n", "\n")).map((part) => [part, part[0] + "\n" + part[1].join("\n")]);
      let same = 0;
      while (same < wanted.length && same < shown.length && shown[same] === wanted[same][1]) same += 1;
      while (container.childNodes.length > same) container.lastChild.remove();
      for (const [part] of wanted.slice(same)) container.append(block(part));
      shown = wanted.map(([, source]) => source);
    };
  }

  return { view };
})();
