// Browsers refuse a worker to pages that are opened from disk, and the theme's search runs in one. There its script runs
// in a hidden frame, and messages go to and fro as with a worker.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement('iframe')
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent('message', { data }))
      const script = frame.contentDocument.createElement('script')
      this.loaded = new Promise(resolve => script.addEventListener('load', resolve))
      script.src = url
      frame.contentDocument.body.append(script)
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent('message', { data })))
    }
  }
}
