// The A/B panel as the sidebar sees it: what state it is in, how to start it, and the page to show.
import { app } from "../../scripts/app.js";
import { rootGraph } from "./stretto_graph.js";
import { Refusal, address, handOver, panelStatus, startPanel, stopPanel } from "./stretto_server.js";
import { say } from "./stretto_texts.js";

const PAUSE = 500;
const START_LIMIT = 120_000;

const rest = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

/** The workflow's name in the editor. */
function nameOfCanvas() {
  const path = app.extensionManager?.workflow?.activeWorkflow?.filename;
  return typeof path === "string" && path ? path : "canvas";
}

/** The address of the panel's page in the editor's own light or dark. */
function inTheme(page) {
  const dark = document.body.classList.contains("dark-theme");
  return `${address(page)}${page.includes("?") ? "&" : "?"}__theme=${dark ? "dark" : "light"}`;
}

/** State of the panel for one sidebar. `changed` is called after every change. */
export class PanelControl {
  constructor(changed) {
    this.changed = changed;
    this.status = null;
    this.note = ""; // what it is busy with, or what went wrong
    this.problem = null; // {message, command?, log?}
    this.page = null; // address of the page in the frame
  }

  set(fields) {
    Object.assign(this, fields);
    this.changed();
  }

  async refresh() {
    try {
      this.set({ status: await panelStatus() });
    } catch (error) {
      this.set({ status: null, problem: { message: error.message } });
    }
    const gone = this.status && !["running", "starting"].includes(this.status.state);
    if (gone && this.page) this.set({ page: null });
  }

  /** Start the panel unless it runs; true when it does. */
  async running() {
    this.set({ problem: null, note: say("starting", { seconds: 0 }) });
    try {
      const port = Number(app.extensionManager?.setting?.get("Stretto.Panel.Port") ?? 0);
      this.set({ status: await startPanel(port) });
      const begun = Date.now();
      while (this.status.state === "starting") {
        const passed = Date.now() - begun;
        if (passed > START_LIMIT) throw new Refusal(say("silent"), this.status);
        this.set({ note: say("starting", { seconds: Math.round(passed / 1000) }) });
        await rest(PAUSE);
        this.set({ status: await panelStatus() });
      }
      if (this.status.state === "running") return true;
      throw new Refusal(say("died", { status: this.status.exit_status ?? "?" }), this.status);
    } catch (error) {
      this.set({ problem: { message: error.message, command: error.answer?.command, log: error.answer?.log } });
      return false;
    } finally {
      this.set({ note: "" });
    }
  }

  /** Hand the canvas's workflow over and return the address of a page that begins with it. */
  async pageForCanvas() {
    if (!(await this.running())) return null;
    try {
      const { page } = await handOver(rootGraph().serialize(), nameOfCanvas());
      return inTheme(page);
    } catch (error) {
      this.set({ problem: { message: error.message } });
      return error.answer?.page ? inTheme(error.answer.page) : null;
    }
  }

  /** "Compare now": the canvas's workflow in the panel, in the sidebar or in a tab of its own. */
  async compare() {
    if (app.extensionManager?.setting?.get("Stretto.Panel.OpenIn") === "tab") {
      return this.inTab(() => this.pageForCanvas());
    }
    const page = await this.pageForCanvas();
    if (page) this.set({ page });
  }

  /** The panel's page with its own history, in a tab of its own. */
  async openPage() {
    return this.inTab(async () => ((await this.running()) ? inTheme(this.status.page) : null));
  }

  /** Browsers open tabs only while a click is fresh: so first the tab, then its address. */
  async inTab(find) {
    const tab = window.open("", "_blank");
    const page = await find();
    if (page && tab) tab.location.replace(page);
    else tab?.close();
    if (page && !tab) this.set({ problem: { message: say("tabBlocked", { page }) } });
  }

  async stop() {
    this.set({ note: say("stopping"), page: null });
    try {
      this.set({ status: await stopPanel(), problem: null });
    } catch (error) {
      this.set({ problem: { message: error.message } });
    } finally {
      this.set({ note: "" });
    }
  }
}
