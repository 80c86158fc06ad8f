// A .tflite file that slimvit wrote, in an Android app: com.google.ai.edge.litert:litert 2.x.
// Not compiled here: there was no Android toolchain at hand. examples/infer_litert.py does the same and is tested.
package slimvit.example

import android.content.Context
import android.graphics.Bitmap
import android.graphics.Color
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import org.json.JSONObject
import kotlin.math.min

/** Logits of a picture. `told` is the JSON that the file's metadata has under "slimvit": what `metadata` in infer_litert.py reads. */
class Classifier(context: Context, asset: String, told: JSONObject) {
    private val how = told.getJSONObject("preprocess")
    private val size = how.getJSONArray("input_size").getInt(1) // [channels, height, width], here square
    private val mean = FloatArray(3) { how.getJSONArray("mean").getDouble(it).toFloat() }
    private val std = FloatArray(3) { how.getJSONArray("std").getDouble(it).toFloat() }
    private val crop = how.optDouble("crop_pct", Double.NaN) // null: all of the picture is scaled
    init {
        check(how.isNull("crop_mode") || how.getString("crop_mode") == "center") { "this crop mode is not in this example" }
    }
    private val model = CompiledModel.create(context.assets, asset, CompiledModel.Options(Accelerator.CPU))
    private val inputs = model.createInputBuffers() // of the first signature, "b1"
    private val outputs = model.createOutputBuffers()

    fun logits(picture: Bitmap): FloatArray {
        inputs[0].writeFloat(planes(prepared(picture)))
        model.run(inputs, outputs)
        return outputs[0].readFloat()
    }

    /** The middle of the picture, with its short edge at size / crop_pct. */
    private fun prepared(picture: Bitmap): Bitmap {
        if (crop.isNaN()) return Bitmap.createScaledBitmap(picture, size, size, true)
        val edge = (size / crop).toInt()
        val short = min(picture.width, picture.height)
        val scaled = Bitmap.createScaledBitmap(picture, picture.width * edge / short, picture.height * edge / short, true)
        return Bitmap.createBitmap(scaled, (scaled.width - size) / 2, (scaled.height - size) / 2, size, size)
    }

    /** [3, size, size]: red, green and blue one after the other, normalised. */
    private fun planes(picture: Bitmap): FloatArray {
        val pixels = IntArray(size * size).also { picture.getPixels(it, 0, size, 0, 0, size, size) }
        val parts = listOf<(Int) -> Int>(Color::red, Color::green, Color::blue)
        return FloatArray(3 * size * size) { i ->
            val channel = i / (size * size)
            (parts[channel](pixels[i % (size * size)]) / 255f - mean[channel]) / std[channel]
        }
    }
}
