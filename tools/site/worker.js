// Workers for pages that are opened from files, where browsers refuse `new Worker(url)`.
//
// The script runs in a hidden frame instead. The frame is an empty page of this page's own origin,
// so both sides can call each other: postMessage in the frame becomes a message event of the
// worker object, and the worker object's postMessage an event in the frame.
"use strict";

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onerror = this.onmessageerror = null;
      this.waiting = []; // messages that came before the script was there
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const start = () => this.load(String(url));
      if (document.body) start();
      else addEventListener("DOMContentLoaded", start, { once: true });
    }

    load(url) {
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data: structuredClone(data) });
        setTimeout(() => this.emit(event)); // later, as from a real worker
      };
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = () => {
        this.inside = inside;
        for (const data of this.waiting.splice(0)) this.postMessage(data);
      };
      script.onerror = () => this.emit(new ErrorEvent("error", { message: `cannot load ${url}` }));
      inside.document.body.append(script);
    }

    emit(event) {
      this.dispatchEvent(event);
      this[`on${event.type}`]?.(event);
    }

    postMessage(data) {
      if (!this.inside) this.waiting.push(data);
      else {
        const copy = this.inside.structuredClone(data); // of the frame's own types
        const event = new this.inside.MessageEvent("message", { data: copy });
        setTimeout(() => this.inside?.dispatchEvent(event));
      }
    }

    terminate() {
      this.inside = undefined;
      this.frame.remove();
    }
  };
}
